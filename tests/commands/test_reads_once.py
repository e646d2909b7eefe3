"""No command reads a `.ckpt` twice, be it for its digest, for its settings or for its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_lightning.__main__ import main
from lora_lightning.checkpoint.manifest import sha256_file
from tests.checkpoint.counting import opened_for_reading
from tests.checkpoint.runs import save_backbone
from tests.commands.language_models import save_language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),  # each test resumes a copy of the run
]

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def trained(folder: Path) -> Path:
    """Train two epochs through the command line, and return the last checkpoint."""
    save_language_model(folder / "base")
    rows = [{"prompt": f"w{index}", "completion": f"w{index + 1}"} for index in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["fit", *arguments(folder), "--trainer.max_epochs=2"]) == 0
    return folder / "runs/version_0/checkpoints/last.ckpt"


def arguments(folder: Path) -> list[str]:
    model = ["--model=CausalLM", f"--model.backbone={folder / 'base'}", "--model.method=LoRA", "--model.method.r=2"]
    data = [
        "--data=InstructionData",
        f"--data.train={folder / 'data.jsonl'}",
        "--data.val_size=2",
        "--data.test_size=2",
    ]
    return [*model, *data, f"--trainer.default_root_dir={folder / 'runs'}", *QUIET]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


COMMANDS = ["merge", "export", "export-merged", "generate", "chat", "fit", "validate", "test"]


@pytest.mark.parametrize(
    ("command", "has_folder"),
    [*((command, has_folder) for command in COMMANDS for has_folder in (True, False)), ("fit-last", True)],
)
def test_reads_once(
    ckpt: Path, command: str, has_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ckpt.parents[3]
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / ckpt.relative_to(run)
    if not has_folder:
        shutil.rmtree(path.with_suffix(""))
    monkeypatch.setattr("builtins.input", lambda _: "/exit")
    name, given = command.partition("-")[0], f"--ckpt_path={path}"
    words = {
        "merge": [given, f"--output_dir={tmp_path / 'out'}"],
        "export": [given, f"--output_dir={tmp_path / 'out'}"],
        "export-merged": [given, f"--output_dir={tmp_path / 'out'}", "--to=merged"],
        "generate": [given, "--prompt=w1", "--max_new_tokens=1"],
        "chat": [given, "--template=dialogue", "--max_new_tokens=1"],
        "fit": [given, *arguments(tmp_path / "run"), "--trainer.max_epochs=3"],
        "validate": [given, *arguments(tmp_path / "run")],
        "test": [given, *arguments(tmp_path / "run")],
        "fit-last": ["--ckpt_path=last", *arguments(tmp_path / "run"), "--trainer.max_epochs=3"],
    }
    with opened_for_reading(".ckpt") as counts:
        assert main([name, *words[command]]) == 0
    assert counts[str(path.resolve())] == 1
    assert max(counts.values()) == 1


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("has_folder", [True, False])
def test_a_classifier_is_read_once(classifier: Path, command: str, has_folder: bool, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "run")
    path = tmp_path / "run/runs/version_0/checkpoints/last.ckpt"
    if not has_folder:
        shutil.rmtree(path.with_suffix(""))
    data = [f"--data.predict={tmp_path / 'run/data.csv'}"] if command == "predict" else []
    with opened_for_reading(".ckpt") as counts:
        assert main([command, f"--ckpt_path={path}", *classifier_arguments(tmp_path / "run"), *data]) == 0
    assert counts == {str(path.resolve()): 1}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    save_backbone(folder / "base")
    rows = [f"w{index} w{index + 1},{'ab'[index % 2]}" for index in range(12)]
    (folder / "data.csv").write_text("\n".join(["text,label", *rows]))
    assert main(["fit", *classifier_arguments(folder), "--trainer.max_epochs=1"]) == 0
    return folder


def classifier_arguments(folder: Path) -> list[str]:
    model = ["--model=SequenceClassification", f"--model.backbone={folder / 'base'}", "--model.method=LoRA"]
    data = ["--data=TextClassificationData", f"--data.train={folder / 'data.csv'}"]
    sizes = ["--data.val_size=4", "--data.test_size=4", "--data.batch_size=4"]
    return [*model, *data, *sizes, f"--trainer.default_root_dir={folder / 'runs'}", *QUIET]


def test_a_plan_reads_no_checkpoint_and_an_adapter_once(ckpt: Path) -> None:
    """`plan` counts what `fit` would start from."""
    folder = ckpt.with_suffix("")
    plain = arguments(ckpt.parents[3])
    trainer = [word for word in plain if word.startswith("--trainer.")]
    assert trainer
    words = [word for word in plain if not word.startswith(("--trainer.", "--model.method"))]
    with opened_for_reading("") as counts:
        assert main(["plan", *words, f"--model.adapter={folder}"]) == 0
    assert not any(name.endswith(".ckpt") for name in counts)
    weights = str((folder / "adapter_model.safetensors").resolve())
    assert counts[weights] == 2  # its digest, and the length of its header


def test_the_count_notices_a_second_reading(ckpt: Path) -> None:
    with opened_for_reading(".ckpt") as counts:
        sha256_file(ckpt)
        sha256_file(ckpt)
    assert counts == {str(ckpt.resolve()): 2}
