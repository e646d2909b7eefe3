"""Adapter folders come and go with their checkpoints, `last` included, and a broken state is never saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lora_lightning.adapters import adapter_state_dict
from lora_lightning.callbacks import AdapterCheckpoint
from lora_lightning.checkpoint import load_adapter, read_adapter_folder
from lora_lightning.checkpoint.pair import replace_link
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineData, LineTask, fit, make_trainer

pytestmark = LIGHTNING_WARNINGS


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoints(folder: Path) -> Path:
    return folder / "run" / "version_0" / "checkpoints"


def assert_twins(folder: Path) -> list[str]:
    """Every checkpoint has its complete adapter folder with the same weights; return the checkpoints' names."""
    files = sorted(folder.glob("*.ckpt"), key=lambda path: path.stem)
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    assert [path.stem for path in files] == [path.name for path in folders]
    for file, twin in zip(files, folders, strict=True):
        checkpoint = torch.load(file, weights_only=True)
        manifest, state = read_adapter_folder(twin)
        assert manifest.step == checkpoint["global_step"]
        assert {f"model.{name}": value.tolist() for name, value in state.items()} == {
            name: value.tolist() for name, value in checkpoint["state_dict"].items()
        }
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return [path.stem for path in files]


def test_defaults_keep_the_newest_and_last(tmp_path: Path) -> None:
    task = LineTask()
    fit(tmp_path, AdapterCheckpoint(), task=task)
    assert assert_twins(checkpoints(tmp_path)) == ["epoch=1-step=12", "last"]
    manifest, state = read_adapter_folder(checkpoints(tmp_path) / "last")
    assert {name: value.tolist() for name, value in state.items()} == {
        name: value.tolist() for name, value in adapter_state_dict(task.adapted).items()
    }
    assert manifest.label_names == ["no", "yes"]
    assert manifest.data_fingerprint == "toy"
    assert manifest.base_fingerprint == task.base_fingerprint
    assert manifest.task == "tests.callbacks.runs.LineTask"
    assert {"val/loss", "val/accuracy", "train/loss"} <= manifest.metrics.keys()
    assert (manifest.epoch, manifest.step) == (1, 12)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_n_train_steps": 4, "save_top_k": -1}, ["epoch=0-step=4", "epoch=1-step=12", "epoch=1-step=8", "last"]),
        ({"every_n_train_steps": 4, "save_top_k": -1, "save_last": False}, 3),
        ({"every_n_train_steps": 2, "save_top_k": 2, "monitor": "train/loss"}, 3),
        ({"monitor": "val/loss", "save_top_k": 1}, 2),
        ({"monitor": "val/accuracy", "mode": "max", "filename": "best", "save_last": None}, ["best"]),
        ({"save_top_k": 0}, 1),
        ({"save_weights_only": True}, 2),
    ],
)
def test_settings_of_model_checkpoint(tmp_path: Path, settings: dict[str, Any], expected: int | list[str]) -> None:
    fit(tmp_path, AdapterCheckpoint(**settings))
    found = assert_twins(checkpoints(tmp_path))
    assert (found if isinstance(expected, list) else len(found)) == expected


@pytest.mark.parametrize("settings", [{}, {"every_n_train_steps": 2}])
def test_last_moves_on_where_the_metric_does_not_improve(tmp_path: Path, settings: dict[str, Any]) -> None:
    saves = []

    class Counting(AdapterCheckpoint):
        def logged_metrics(self) -> dict[str, None]:
            return {"train/loss": None}  # here, no direction is the better one

        def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
            saves.append((trainer.global_step, Path(filepath).stem))
            super()._save_checkpoint(trainer, filepath)

    fit(tmp_path, Counting(monitor="train/loss", mode="max", filename="best", enable_version_counter=False, **settings))
    best, last = (read_adapter_folder(checkpoints(tmp_path) / name)[0].step for name in ("best", "last"))
    assert best < last == 12
    assert len(saves) == len(set(saves))


def test_last_is_written_on_the_way_where_nothing_else_is_kept(tmp_path: Path) -> None:
    callback = AdapterCheckpoint(save_top_k=0)
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, callback, Stop())
    assert assert_twins(checkpoints(tmp_path)) == ["last"]
    assert read_adapter_folder(checkpoints(tmp_path) / "last")[0].step == 6


class Stop(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 8:
            raise RuntimeError("stop")


def test_last_as_a_link(tmp_path: Path) -> None:
    callback = AdapterCheckpoint(save_last="link", every_n_train_steps=4, save_top_k=1)
    fit(tmp_path, callback)
    folder = checkpoints(tmp_path)
    assert assert_twins(folder) == ["epoch=1-step=12", "last"]
    assert (folder / "last").is_symlink()
    assert (folder / "last.ckpt").is_symlink()
    assert (folder / "last").resolve() == folder / "epoch=1-step=12"


def test_a_link_replaces_a_folder_and_a_folder_a_link(tmp_path: Path) -> None:
    fit(tmp_path, AdapterCheckpoint(dirpath=tmp_path / "c", save_last=True), max_epochs=1)
    replace_link(tmp_path / "c" / "epoch=0-step=6", tmp_path / "c" / "last")
    assert (tmp_path / "c" / "last").is_symlink()
    assert assert_twins(tmp_path / "c") == ["epoch=0-step=6", "last"]
    callback = AdapterCheckpoint(dirpath=tmp_path / "c", enable_version_counter=False)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(tmp_path, callback, max_epochs=1)
    assert not (tmp_path / "c" / "last").is_symlink()
    assert assert_twins(tmp_path / "c") == ["epoch=0-step=6", "last"]


def test_version_counter(tmp_path: Path) -> None:
    fit(tmp_path, AdapterCheckpoint(dirpath=tmp_path / "c"), max_epochs=1)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(tmp_path, AdapterCheckpoint(dirpath=tmp_path / "c"), max_epochs=1)
    assert assert_twins(tmp_path / "c") == ["epoch=0-step=6", "epoch=0-step=6-v1", "last", "last-v1"]


def test_resumes_and_moves_last_on(tmp_path: Path) -> None:
    task = LineTask()
    fit(tmp_path, AdapterCheckpoint(), task=task, max_epochs=1)
    trainer = make_trainer(tmp_path, AdapterCheckpoint(), max_epochs=2)
    with pytest.warns(UserWarning, match="is not empty"):
        trainer.fit(LineTask(), LineData(), ckpt_path=checkpoints(tmp_path) / "last.ckpt", weights_only=True)
    found = assert_twins(checkpoints(tmp_path))
    assert "epoch=1-step=12" in found
    assert read_adapter_folder(checkpoints(tmp_path) / "last")[0].step == 12


def test_folder_loads_into_a_fresh_model(tmp_path: Path) -> None:
    task = LineTask()
    fit(tmp_path, AdapterCheckpoint(), task=task)
    other = LineTask()
    other.configure_model()
    x = torch.randn(3, 8)
    assert not torch.allclose(other.adapted(x), task.adapted(x), atol=1e-4)
    load_adapter(other.adapted, checkpoints(tmp_path) / "last")
    assert torch.equal(other.adapted(x), task.adapted(x))


class Poison(L.Callback):
    """Puts a NaN into the adapter after some steps."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            with torch.no_grad():
                next(iter(adapter_state_dict(pl_module.adapted).values()))[0, 0] = float("nan")


def test_nan_is_not_saved(tmp_path: Path) -> None:
    callback = AdapterCheckpoint(every_n_train_steps=2, save_top_k=1)
    with pytest.raises(CheckpointError, match=r"at step 6, which was not saved, holds NaN .*'0\.lora_A'"):
        fit(tmp_path, callback, Poison())
    assert assert_twins(checkpoints(tmp_path)) == ["epoch=0-step=4", "last"]
    assert read_adapter_folder(checkpoints(tmp_path) / "last")[0].step == 4


class NoAdapters(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 2)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch["x"]), batch["labels"])

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), batch_size=len(batch["x"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_module_without_adapters_gets_plain_checkpoints(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no adapters attached"):
        fit(tmp_path, AdapterCheckpoint(), task=NoAdapters())
    assert names(checkpoints(tmp_path)) == ["epoch=1-step=12.ckpt", "last.ckpt"]


class OwnModule(NoAdapters):
    """A LightningModule that attaches adapters to itself, without AdapterTask."""

    def __init__(self) -> None:
        super().__init__()
        from lora_lightning import attach

        attach(self, LoRA(r=1, target_modules=["layer"]))


def test_any_module_with_adapters_gets_folders(tmp_path: Path) -> None:
    fit(tmp_path, AdapterCheckpoint(), task=OwnModule())
    manifest, state = read_adapter_folder(checkpoints(tmp_path) / "last")
    assert list(state) == ["layer.lora_A", "layer.lora_B"]
    assert (manifest.base, manifest.label_names) == (None, None)


def test_sharded_models_get_plain_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lightning.callbacks.adapter_checkpoint.writes_folders", lambda *_: False)
    with pytest.warns(UserWarning, match="sharded over processes"):
        fit(tmp_path, AdapterCheckpoint())
    assert names(checkpoints(tmp_path)) == ["epoch=1-step=12.ckpt", "last.ckpt"]


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, AdapterCheckpoint(), fast_dev_run=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def resume(folder: Path, callback: AdapterCheckpoint, ckpt_path: str | Path, **settings: Any) -> L.Trainer:
    trainer = make_trainer(folder, callback, **{"max_epochs": 2, **settings})
    trainer.fit(LineTask(), LineData(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_damaged_checkpoint_is_refused_by_name_and_left_out_as_last(tmp_path: Path) -> None:
    fit(tmp_path, AdapterCheckpoint(every_n_train_steps=4, save_top_k=-1), max_epochs=1, max_steps=4)
    folder = checkpoints(tmp_path)
    flip(folder / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt differs .* beside it is .*epoch=0-step=4\.ckpt \(step 4\)"):
        resume(tmp_path, AdapterCheckpoint(), folder / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt differs"):
        LineTask.load_from_checkpoint(folder / "last.ckpt")
    assert LineTask.load_from_checkpoint(folder / "epoch=0-step=4.ckpt").model is not None
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged, so the run resumes from .*epoch=0-step=4\.ckpt"):
        trainer = resume(tmp_path, AdapterCheckpoint(every_n_train_steps=4, save_top_k=-1), "last", max_epochs=1)
    assert trainer.global_step == 6


def test_a_nan_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, AdapterCheckpoint(), max_epochs=1)
    path = checkpoints(tmp_path) / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["state_dict"].values()))[0, 0] = float("nan")
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="The checkpoint holds NaN or infinite values in 1 of 2 tensors"):
        LineTask.load_from_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_what_a_killed_run_had_replaced_goes_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: Any) -> None:
        raise RuntimeError("killed")

    settings: dict[str, Any] = {"every_n_train_steps": 2, "save_last": False}
    with monkeypatch.context() as patch:
        patch.setattr(AdapterCheckpoint, "_remove_checkpoint", die)
        with pytest.raises(RuntimeError, match="killed"):
            fit(tmp_path, AdapterCheckpoint(**settings), max_epochs=1)
    folder = checkpoints(tmp_path)
    assert assert_twins(folder) == ["epoch=0-step=2", "epoch=0-step=4"]
    (folder / ".last.ckpt.01234567.tmp").write_text("half")
    resume(tmp_path, AdapterCheckpoint(**settings), "last", max_epochs=1)
    # The one that was named to go on from stays, as with Lightning's own callback.
    assert assert_twins(folder) == ["epoch=0-step=4", "epoch=0-step=6"]


def assert_twins_of(folder: Path) -> list[str]:
    return assert_twins(folder)


def test_a_link_never_dangles(tmp_path: Path) -> None:
    seen = []

    class Watching(AdapterCheckpoint):
        def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
            super()._remove_checkpoint(trainer, filepath)
            last = Path(str(self.dirpath)) / "last.ckpt"
            seen.append(torch.load(last, weights_only=True)["global_step"])

    fit(tmp_path, Watching(save_last="link", every_n_train_steps=4))
    assert seen == [8, 12]


def test_a_plugin_of_the_users_own_stays(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        """Counts what is saved."""

        num_saves = 0

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.num_saves += 1
            super().save_checkpoint(*args, **kwargs)

    own = Own()
    fit(tmp_path, AdapterCheckpoint(), plugins=[own], max_epochs=1)
    assert own.num_saves == 2
    assert assert_twins(checkpoints(tmp_path)) == ["epoch=0-step=6", "last"]
