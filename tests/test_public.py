"""The static table of public names keeps itself: a script writes it from the source, and everything else reads it."""

import difflib
import importlib
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning
from lora_lightning import callbacks, data, methods, tasks
from lora_lightning.adapters import Method
from lora_lightning.commands import all_commands, load_command
from lora_lightning.commands._compare.entries import known_names
from lora_lightning.commands._compare.report.words import words_of
from lora_lightning.public import classes_of, table
from tests.contract.examples import concrete_methods

ROOT = Path(__file__).parent.parent
NEW_METHOD = '''"""LoRA of half the rank."""

from dataclasses import dataclass
from typing import ClassVar

from lora_lightning.adapters.base import About
from lora_lightning.methods.lora import LoRA

__all__ = ["HalfLoRA"]


@dataclass(frozen=True, kw_only=True)
class HalfLoRA(LoRA):
    """LoRA that starts at half the rank."""

    name: ClassVar[str] = "half_lora"
    about: ClassVar[About] = About(trains="half of `W`", where="linear layers", suits="a test")

    r: int = 4
'''
EXAMPLE = """    lora_lightning.methods.HalfLoRA: {
        "half": Example(method=lora_lightning.methods.HalfLoRA(target_modules="all-linear"), is_exact=True)
    },
"""


def load_script(root):
    spec = importlib.util.spec_from_file_location("public_script", root / "scripts" / "public.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def copied(tmp_path):
    """A copy of the project in which files may be added."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "_build", "generated")
    for folder in ("lora_lightning", "scripts", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def run(root, *words):
    """Run Python in a copy of the project, whose package it imports."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)


def added_lines(root, name):
    """Return the lines of a file of the copy that the original lacks, and the number of those that it has lost."""
    before, after = (ROOT / name).read_text().splitlines(), (root / name).read_text().splitlines()
    changes = [line for line in difflib.ndiff(before, after) if line[:2] in ("+ ", "- ")]
    return [line[2:] for line in changes if line[0] == "+"], sum(line[0] == "-" for line in changes)


def test_the_table_and_the_readme_are_what_the_script_writes():
    script = load_script(ROOT)
    assert (ROOT / "lora_lightning" / "__init__.pyi").read_text() == script.table_text(ROOT)
    assert (ROOT / "README.md").read_text() == script.readme_text(ROOT)


def test_what_is_out_of_date_is_named(copied):
    assert run(copied, "scripts/public.py", "--check").returncode == 0
    readme = copied / "README.md"
    readme.write_text(readme.read_text().replace("| biases, all or some |", "| nothing |"))
    checked = run(copied, "scripts/public.py", "--check")
    assert (checked.returncode, checked.stdout) == (1, "README.md is out of date; run scripts/public.\n")


@pytest.mark.parametrize(("name", "module"), table().modules.items(), ids=list(table().modules))
def test_every_name_is_defined_where_the_table_says(name, module):
    value = getattr(importlib.import_module(module), name)
    assert value.__module__ == module
    assert getattr(lora_lightning, name) is value


def test_the_packages_have_the_classes_of_the_table():
    for package, room in ((methods, "methods"), (tasks, "tasks"), (data, "data"), (callbacks, "callbacks")):
        assert set(package.__all__) >= set(classes_of(room)) != set()
        for name in package.__all__:
            assert getattr(package, name) is getattr(lora_lightning, name)


def test_no_method_and_no_command_is_forgotten():
    assert {cls.__name__ for cls in concrete_methods()} == set(classes_of("methods"))
    files = {path.stem for path in (ROOT / "lora_lightning" / "commands").glob("[!_]*.py")}
    assert files == {name.replace("-", "_") for name in table().commands}
    for name, summary in table().commands.items():
        assert all_commands()[name] == summary == inspect.getdoc(load_command(name)).partition("\n")[0]


def test_the_words_of_a_comparison_come_from_the_classes():
    for name, cls in known_names().items():
        if cls.__module__.startswith("lora_lightning.methods."):
            assert words_of(name) is cls.about, name
            assert "-" not in vars(cls.about).values(), name
    assert words_of("LoRA+").suits != "-"
    assert words_of("Unknown").suits == Method.about.suits == "-"


@pytest.mark.slow
def test_a_new_method_is_one_file_one_line_and_one_example(copied):
    (copied / "lora_lightning" / "methods" / "half_lora.py").write_text(NEW_METHOD)
    line = "from lora_lightning.methods.half_lora import HalfLoRA as HalfLoRA"
    assert run(copied, "scripts/public.py", "--check").returncode == 1
    assert run(copied, "scripts/public.py").returncode == 0
    assert added_lines(copied, "lora_lightning/__init__.pyi") == ([line], 0)
    assert added_lines(copied, "README.md") == (["| `HalfLoRA` | half of `W` | linear layers |"], 0)

    contract = copied / "tests" / "contract"
    examples = contract / "examples.py"
    forgotten = "test_every_method_has_an_example"
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(contract), "-k")
    without = run(copied, *command, forgotten)
    assert without.returncode == 1
    assert "add settings of {'HalfLoRA'} to EXAMPLES" in without.stdout
    start = "EXAMPLES: dict[type[Method], dict[str, Example]] = {\n"
    examples.write_text(examples.read_text().replace(start, start + EXAMPLE))
    with_example = run(copied, *command, f"{forgotten} or (half and first_forward)")
    assert with_example.returncode == 0, with_example.stdout
    assert int(with_example.stdout.split(" passed")[0].split()[-1]) >= 3


@pytest.mark.slow
def test_a_new_method_has_its_short_name_everywhere(copied):
    (copied / "lora_lightning" / "methods" / "half_lora.py").write_text(NEW_METHOD)
    assert run(copied, "scripts/public.py").returncode == 0
    code = """
from lora_lightning import HalfLoRA, methods
from lora_lightning.commands._compare.entries import known_names
from lora_lightning.commands._compare.report.words import words_of
assert methods.HalfLoRA is HalfLoRA is known_names()["HalfLoRA"]
assert words_of("HalfLoRA").suits == "a test"
from lora_lightning.__main__ import main
main(["fit", "--model", "CausalLM", "--model.method", "HalfLoRA", "--model.method.alpha", "3", "--print_config"])
"""
    printed = run(copied, "-c", code)
    assert printed.returncode == 0, printed.stderr
    assert "class_path: lora_lightning.HalfLoRA" in printed.stdout
    assert "alpha: 3.0" in printed.stdout
