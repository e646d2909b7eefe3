"""The adapted model and the folder of a run, for callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lora_lightning.adapters import is_attached
from lora_lightning.adapters.walk import was_attached_to

if TYPE_CHECKING:
    import lightning as L


def adapted_model(module: L.LightningModule) -> nn.Module | None:
    """Return the model with adapters inside a LightningModule, or None if there is none.

    Args:
        module: An `AdapterTask`, or any LightningModule to a submodule of which adapters were attached. If adapters
            were attached to several, the LightningModule itself is returned.
    """
    models = [model for model in module.modules() if was_attached_to(model)]
    if len(models) == 1:
        return models[0]
    return module if is_attached(module) else None


def run_folder(trainer: L.Trainer) -> Path:
    """Return the folder of the current run: the logger's, or `default_root_dir` without one.

    All ranks must call it, since rank 0 broadcasts the result.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def log_interval(trainer: L.Trainer) -> int:
    """Return the trainer's logging interval in optimizer steps."""
    return max(int(trainer.log_every_n_steps), 1)  # type: ignore[attr-defined]  # set by Lightning's logger connector


def passed_interval(trainer: L.Trainer, last_step: int) -> bool:
    """Return whether a multiple of the logging interval was reached since `last_step`.

    One batch may count for several steps, with as many optimizers, so that the count skips multiples.
    """
    interval = log_interval(trainer)
    return trainer.global_step // interval > last_step // interval


def is_trial(trainer: L.Trainer) -> bool:
    """Return whether this is a `fast_dev_run`, which leaves no files behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning's debugging setup


def free_name(path: Path) -> Path:
    """Return the path, or if it is taken the path with `-2`, `-3`, … before the suffix."""
    candidates = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 10_000))
    return path if not path.exists() else next(one for one in candidates if not one.exists())
