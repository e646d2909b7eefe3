"""Merge the best or the last checkpoint when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.callbacks.places import is_trial, run_folder
from lora_lightning.checkpoint.merging import merge_checkpoint, refuse_taken
from lora_lightning.errors import ConfigError


class MergeAtEnd(L.Callback):
    """Merge a checkpoint of the run into its base when `fit` ends, into a folder that plain transformers loads.

    The merge starts from the checkpoint file, with the base loaded anew, exactly as `lora-lightning merge` does; the
    running model stays adapted. Rank 0 does it while the others wait.

    Args:
        output_dir: Where to; None means `merged` in the run's folder. It must not exist, or be empty.
        which: `best` takes the best checkpoint by the metric that the checkpoint callback monitors (the newest where
            it monitors none), `last` the last one.

    Raises:
        ConfigError: `which` is something else.
    """

    def __init__(self, output_dir: str | Path | None = None, which: Literal["best", "last"] = "best") -> None:
        if which not in ("best", "last"):
            raise ConfigError(f"MergeAtEnd: which must be best or last, got {which!r}.")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.which = which
        self.merged_dir: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a folder that is taken before any training is done."""
        del pl_module
        if stage == "fit":
            refuse_taken(self._folder(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge on rank 0."""
        folder = self._folder(trainer)
        if trainer.is_global_zero and not is_trial(trainer):
            self._merge(trainer, pl_module, folder)
        trainer.strategy.barrier("MergeAtEnd")

    def _merge(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        path = checkpoint_path(trainer, self.which)
        if path is None:
            rank_zero_warn(f"MergeAtEnd found no {self.which} checkpoint, so nothing was merged.")
            return
        report = merge_checkpoint(path, folder, task_class=type(pl_module))
        self.merged_dir = report.output_dir
        rank_zero_info(
            f"Merged {path.name} into {report.output_dir}: {report.survived:.1%} of the update's elements survived the "
            "cast to the base's precision."
        )

    def _folder(self, trainer: L.Trainer) -> Path:
        return run_folder(trainer) / "merged" if self.output_dir is None else self.output_dir


def checkpoint_path(trainer: L.Trainer, which: Literal["best", "last"]) -> Path | None:
    """Return the best or last checkpoint of a run; where only the other one was kept, that one."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return None
    paths = [callback.best_model_path, callback.last_model_path]
    if which == "last":
        paths.reverse()
    return next((Path(path) for path in paths if path and Path(path).exists()), None)
