"""Tasks are built again from classes that are trusted, with the arguments that their constructors were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning.adapters import adapter_state_dict
from lora_lightning.checkpoint.task_class import find_task_class
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA
from tests.checkpoint.runs import PlainTask, rebuild_task, save_checkpoint


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


def test_finds_classes_of_the_library_and_imported_ones() -> None:
    path = Path("x.ckpt")
    assert find_task_class("tests.checkpoint.runs.PlainTask", None, path) is PlainTask
    found = find_task_class("lora_lightning.tasks.SequenceClassification", None, path)
    assert found.__name__ == "SequenceClassification"


def test_imports_nothing_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text(
        "from pathlib import Path\nfrom lightning import LightningModule\n"
        "Path(__file__).with_name('ran').touch()\nclass Task(LightningModule): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = "stranger.Task"
    with pytest.raises(CheckpointError, match=r"importing it runs its code.*--task_class stranger\.Task"):
        find_task_class(checkpoint, None, Path("x.ckpt"))
    assert not (tmp_path / "ran").exists()
    assert find_task_class(checkpoint, "stranger.Task", Path("x.ckpt")).__name__ == "Task"


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        (None, "does not say which task wrote it"),
        ("Task", "does not say which task wrote it"),
        ("lora_lightning.tasks.Missing", "cannot be used: The module `lora_lightning.tasks` .* has no class `Missing`"),
        ("lora_lightning.nowhere.Task", "There is no module `lora_lightning.nowhere`"),
        ("os.system", "not a subclass of lightning.LightningModule"),
    ],
)
def test_bad_class_paths(class_path: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_task_class(class_path, None, Path("x.ckpt"))


def test_settings_that_do_not_fit(ckpt: Path) -> None:
    class Strict(PlainTask):
        def __init__(self, needed: int) -> None:
            super().__init__()

    with pytest.raises(CheckpointError, match=r"do not fit .*Strict.*needed"):
        rebuild_task(ckpt, Strict)
