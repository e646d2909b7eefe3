"""Merge the best or the last checkpoint when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.adapters.merge import refuse_unmergeable_kinds
from lora_lightning.callbacks.places import adapted_model, is_trial, run_folder
from lora_lightning.errors import ConfigError, NotMergeable
from lora_lightning.finetuning import is_finetuned
from lora_lightning.keywords import NamesNearest
from lora_lightning.merging.merge import merge_checkpoint, refuse_taken
from lora_lightning.merging.precision import DTYPES
from lora_lightning.merging.report import MergeReport, UpdateLost

__all__ = ["MergeAtEnd"]


class MergeAtEnd(NamesNearest, L.Callback):
    """Merge a checkpoint of the run into its base when `fit` ends, into a folder that plain transformers loads.

    The merge starts from the checkpoint file and reloads the base, exactly like `lora-lightning merge`; the running
    model is not changed. Rank 0 merges while the others wait.

    Args:
        output_dir: The folder to write; None means `merged` in the run's folder. It must not exist, or be empty.
        which: `best` takes the best checkpoint by the metric that the checkpoint callback monitors (the newest if it
            monitors none), `last` the last one.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the base's own.
        dequantize: Merge a run on a quantized base into the dequantized base, not into the dense one.
        force: Write even if the cast to `dtype` loses most of the update; otherwise that is a warning, and nothing is
            written.

    Raises:
        ConfigError: `which` or `dtype` has another value; when `fit` starts, the adapters cannot be merged, or the run
            uses `AdapterFinetuning`, which merges with `merge_to`.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        which: Literal["best", "last"] = "best",
        dtype: str | None = None,
        dequantize: bool = False,
        force: bool = False,
    ) -> None:
        if which not in ("best", "last"):
            raise ConfigError(f"MergeAtEnd: which must be best or last, got {which!r}.")
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"MergeAtEnd: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.dtype, self.dequantize, self.force = dtype, dequantize, force
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.which = which
        self.merged_dir: Path | None = None
        self.report: MergeReport | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a folder that is taken, before training."""
        del pl_module
        if stage == "fit":
            refuse_taken(self._folder(trainer))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse adapters that cannot be merged, before training."""
        del trainer
        if is_finetuned(pl_module):
            raise ConfigError(
                "MergeAtEnd merges the checkpoints of tasks. Use AdapterFinetuning(merge_to=...) instead."
            )
        model = adapted_model(pl_module)
        if model is None:
            return
        try:
            refuse_unmergeable_kinds(model)
        except NotMergeable as error:
            raise ConfigError(f"MergeAtEnd cannot merge what this run trains, so leave it out: {error}") from error

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
        try:
            report = merge_checkpoint(
                path, folder, type(pl_module), dtype=self.dtype, dequantize=self.dequantize, force=self.force
            )
        except UpdateLost as error:
            rank_zero_warn(f"MergeAtEnd: {error}")
            return
        self.merged_dir, self.report = report.output_dir, report
        rank_zero_info(f"Merged {path.name} into {report.output_dir}. {report.loss.lines()[0]}")

    def _folder(self, trainer: L.Trainer) -> Path:
        return run_folder(trainer) / "merged" if self.output_dir is None else self.output_dir


def checkpoint_path(trainer: L.Trainer, which: Literal["best", "last"]) -> Path | None:
    """Return the best or last checkpoint of a run; the other one if only that was kept."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return None
    paths = [callback.best_model_path, callback.last_model_path]
    if which == "last":
        paths.reverse()
    return next((Path(path) for path in paths if path and Path(path).exists()), None)
