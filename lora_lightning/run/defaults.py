"""The callbacks that every run of the command gets."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar

from lora_lightning.callbacks import (
    AdapterCheckpoint,
    AdapterSummary,
    Guards,
    MetricCurve,
    PacedProgressBar,
    PlainProgress,
    RankWatch,
    RunReport,
    Throughput,
)
from lora_lightning.checks import RunCheck
from lora_lightning.run.trainer import LogInterval


def default_callbacks(
    configured: list[L.Callback], trainer: dict[str, Any], guards: Guards | None = None
) -> list[L.Callback]:
    """Return the callbacks that every run gets, without those that the user configured or switched off.

    Args:
        configured: The callbacks that the user named.
        trainer: The trainer's settings.
        guards: Which guards are on; None means all.
    """

    def wanted(kind: type, switch: str | None = None) -> bool:
        is_off = switch is not None and trainer.get(switch) is False
        return not is_off and not any(isinstance(callback, kind) for callback in configured)

    if trainer.get("barebones"):
        return []
    callbacks: list[L.Callback] = []
    if wanted(Checkpoint, "enable_checkpointing"):
        callbacks.append(AdapterCheckpoint())
    if wanted(ModelSummary, "enable_model_summary"):
        callbacks.append(AdapterSummary())
    if wanted(RunCheck):
        callbacks.append(RunCheck())  # before the callback that writes the run's settings
    if wanted(LogInterval):
        callbacks.append(LogInterval())
    if wanted(Throughput):
        callbacks.append(Throughput())
    if wanted(ProgressBar, "enable_progress_bar"):  # after Throughput, whose figures it shows
        callbacks.append(PacedProgressBar() if sys.stdout.isatty() else PlainProgress())
    if wanted(MetricCurve):
        callbacks.append(MetricCurve())
    if wanted(RunReport):
        callbacks.append(RunReport())
    if wanted(RankWatch):
        callbacks.append(RankWatch())
    return callbacks + [guard for guard in (guards or Guards()).callbacks() if wanted(type(guard))]
