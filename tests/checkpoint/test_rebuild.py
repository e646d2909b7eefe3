"""Checkpoints are read without running code, and tasks are rebuilt from classes that are trusted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning.adapters import adapter_state_dict
from lora_lightning.checkpoint.rebuild import find_task_class, read_checkpoint, rebuild_task
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA
from tests.checkpoint.runs import PlainTask, save_checkpoint


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return save_checkpoint(PlainTask(method=LoRA(r=2, target_modules=["0"])), tmp_path / "step=3.ckpt")


def test_rebuilds_the_task_with_its_weights(ckpt: Path) -> None:
    task = rebuild_task(ckpt)
    assert type(task) is PlainTask
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    assert {f"model.{name}" for name in adapter_state_dict(task.model)} == set(state)
    for name, tensor in adapter_state_dict(task.model).items():
        assert torch.equal(tensor, state[f"model.{name}"])
        assert tensor.abs().max() > 0


def test_missing_file_names_the_others(ckpt: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*other\.ckpt; in its folder are step=3\.ckpt"):
        read_checkpoint(ckpt.with_name("other.ckpt"))


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder; name the \.ckpt file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_not_a_checkpoint(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="no checkpoint that can be read safely"):
        read_checkpoint(path)


def test_truncated(ckpt: Path) -> None:
    data = ckpt.read_bytes()
    read_checkpoint(ckpt)
    ckpt.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="no checkpoint that can be read safely"):
        read_checkpoint(ckpt)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Canary(tmp_path / "canary")}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint that can be read safely"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1], {"hyper_parameters": {}, "state_dict": 1}])
def test_other_content(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="was not written by a task of lora_lightning"):
        read_checkpoint(tmp_path / "x.ckpt")


def checkpoint_of(class_path: Any) -> dict[str, Any]:
    return {"hyper_parameters": {"_class_path": class_path}}


def test_finds_classes_of_the_library_and_imported_ones() -> None:
    path = Path("x.ckpt")
    assert find_task_class(checkpoint_of("tests.checkpoint.runs.PlainTask"), None, path) is PlainTask
    found = find_task_class(checkpoint_of("lora_lightning.tasks.SequenceClassification"), None, path)
    assert found.__name__ == "SequenceClassification"


def test_imports_nothing_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text(
        "from pathlib import Path\nfrom lightning import LightningModule\n"
        "Path(__file__).with_name('ran').touch()\nclass Task(LightningModule): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = checkpoint_of("stranger.Task")
    with pytest.raises(CheckpointError, match=r"importing it runs its code.*--task_class stranger\.Task"):
        find_task_class(checkpoint, None, Path("x.ckpt"))
    assert not (tmp_path / "ran").exists()
    assert find_task_class(checkpoint, "stranger.Task", Path("x.ckpt")).__name__ == "Task"


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        (None, "does not say which task wrote it"),
        ("Task", "does not say which task wrote it"),
        ("lora_lightning.tasks.Missing", "cannot be imported"),
        ("lora_lightning.nowhere.Task", "cannot be imported"),
        ("os.system", "is no LightningModule"),
    ],
)
def test_bad_class_paths(class_path: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_task_class(checkpoint_of(class_path), None, Path("x.ckpt"))


def test_settings_that_do_not_fit(ckpt: Path) -> None:
    class Strict(PlainTask):
        def __init__(self, needed: int) -> None:
            super().__init__()

    with pytest.raises(CheckpointError, match=r"do not fit .*Strict.*needed"):
        rebuild_task(ckpt, Strict)
