"""A run ends with a merged model of its best or last checkpoint, and never overwrites another one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lightning.adapters import is_attached
from lora_lightning.callbacks import AdapterCheckpoint, MergeAtEnd
from lora_lightning.callbacks.merge_at_end import checkpoint_path
from lora_lightning.checkpoint import read_manifest
from lora_lightning.errors import CheckpointError, ConfigError
from tests.adapters.toys import Scale
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineTask, fit, make_trainer

pytestmark = LIGHTNING_WARNINGS


def merged_model(folder: Path) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def test_last_equals_the_running_model(tmp_path: Path) -> None:
    task, callback = LineTask(), MergeAtEnd(which="last")
    fit(tmp_path, AdapterCheckpoint(), callback, task=task)
    assert callback.merged_dir == tmp_path / "run" / "version_0" / "merged"
    assert is_attached(task.adapted)
    x = torch.randn(5, 8)
    torch.testing.assert_close(merged_model(callback.merged_dir)(x), task.adapted(x), atol=1e-5, rtol=0)
    assert not torch.allclose(task.configure_backbone()(x), task.adapted(x), atol=1e-3)  # negative control


def test_best_is_another_checkpoint_than_last(tmp_path: Path) -> None:
    # The worst, surely not the last. The task logs it by itself, so that nothing knows which mode is right.
    settings = {"monitor": "val/accuracy", "mode": "min", "save_top_k": 1}
    steps = {}
    for which in ("best", "last"):
        fit(tmp_path / which, AdapterCheckpoint(**settings), MergeAtEnd(tmp_path / f"out-{which}", which))
        steps[which] = read_manifest(tmp_path / f"out-{which}").step
    assert steps == {"best": 6, "last": 12}


def test_taken_folder_stops_before_training(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        fit(tmp_path, AdapterCheckpoint(), MergeAtEnd(target))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_cannot_be_merged_stops_before_training(tmp_path: Path) -> None:
    task = LineTask(Scale(target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"MergeAtEnd cannot merge .* leave it out: InputScale changes more than"):
        fit(tmp_path, AdapterCheckpoint(), MergeAtEnd(tmp_path / "merged"), task=task)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "merged").exists()
    fit(tmp_path / "without", AdapterCheckpoint(), task=LineTask(Scale(target_modules=["0"])))  # negative control
    assert list(tmp_path.rglob("*.ckpt"))


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    callback = MergeAtEnd(tmp_path / "merged")
    with pytest.warns(UserWarning, match="found no best checkpoint"):
        fit(tmp_path, callback)
    assert callback.merged_dir is None
    assert not (tmp_path / "merged").exists()


def test_fast_dev_run_merges_nothing(tmp_path: Path) -> None:
    fit(tmp_path, AdapterCheckpoint(), MergeAtEnd(tmp_path / "merged"), fast_dev_run=True)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("which", ["best", "last"])
def test_takes_the_other_one_where_one_was_not_kept(tmp_path: Path, which: Literal["best", "last"]) -> None:
    callback = AdapterCheckpoint()
    trainer = make_trainer(tmp_path, callback)
    assert checkpoint_path(trainer, which) is None
    (tmp_path / "x.ckpt").touch()
    callback.best_model_path = str(tmp_path / "x.ckpt")
    callback.last_model_path = str(tmp_path / "gone.ckpt")
    assert checkpoint_path(trainer, which) == tmp_path / "x.ckpt"


def test_which_must_be_known() -> None:
    with pytest.raises(ConfigError, match="which must be best or last, got 'first'"):
        MergeAtEnd(which="first")  # type: ignore[arg-type]


def test_dtype_must_be_known() -> None:
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, float16, got 'int4'"):
        MergeAtEnd(dtype="int4")


@pytest.mark.parametrize("force", [False, True])
def test_a_lost_update_is_a_warning_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    monkeypatch.setattr("lora_lightning.merging.report.MergeLoss.kept", 0.1)
    callback = MergeAtEnd(tmp_path / "merged", dtype="bfloat16", force=force)
    if force:
        fit(tmp_path, AdapterCheckpoint(), callback)
        assert load_file(tmp_path / "merged" / "model.safetensors")["0.weight"].dtype == torch.bfloat16
        return
    with pytest.warns(UserWarning, match="MergeAtEnd: Merging into bfloat16 would lose the update"):
        fit(tmp_path, AdapterCheckpoint(), callback)
    assert callback.merged_dir is None
    assert not (tmp_path / "merged").exists()
