"""The last messages of `fit`: paths of its results, and next commands."""

from __future__ import annotations

import shlex
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_lightning.callbacks import MergeAtEnd
from lora_lightning.callbacks.places import is_trial, run_folder

PROG = "lora-lightning"


def ending(trainer: L.Trainer, *, is_language_model: bool) -> list[str]:
    """Return the last lines of a run: its folder, its best and last checkpoint, and the next commands.

    All ranks must call it.

    Args:
        trainer: The trainer, after `fit`.
        is_language_model: Whether the trained model generates text.
    """
    folder = run_folder(trainer)
    if is_trial(trainer):
        return []
    lines = [f"Run folder: {folder}"] if folder.exists() else []
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return lines
    best, last = _existing(callback.best_model_path), _existing(callback.last_model_path)
    if best is not None and best != last and callback.best_model_score is not None:
        lines.append(f"Best checkpoint: {best} ({callback.monitor} {float(callback.best_model_score):.4g})")
    if callback.monitor and last is not None and callback.best_model_score is None:
        lines.append(f"No best checkpoint: the run ended before {callback.monitor} was measured.")
    if last is not None:
        lines.append(f"Last checkpoint: {last}{_metric_now(trainer, callback.monitor)}")
    chosen = best or last
    if chosen is None:
        return lines
    merged = any(isinstance(one, MergeAtEnd) and one.merged_dir for one in trainer.callbacks)  # type: ignore[attr-defined]  # set by Lightning's callback connector
    has_test = getattr(trainer.datamodule, "counts", {}).get("test") != 0  # type: ignore[attr-defined]  # set by Lightning's data connector
    commands = next_commands(folder, chosen, is_language_model, merged, has_test=has_test)
    return [*lines, "Next:", *(f"  {one}" for one in commands)]


def next_commands(
    folder: Path, checkpoint: Path, is_language_model: bool, is_merged: bool, *, has_test: bool = True
) -> list[str]:
    """Return commands that use a checkpoint.

    Args:
        folder: The run's folder.
        checkpoint: The checkpoint.
        is_language_model: Whether the model generates text.
        is_merged: Whether the run has merged it already.
        has_test: Whether the data have rows to test on, which `predict` takes too unless it is given others.
    """
    path = f"--ckpt_path {shlex.quote(str(checkpoint))}"
    config = f"--config {shlex.quote(str(folder / 'config.yaml'))}"
    test = f"{PROG} test {config} {path}"
    predict = f"{PROG} predict {config} {path}" if has_test else f"{PROG} predict {path} --data.predict FILE"
    use = f'{PROG} generate {path} --prompt "Hello"' if is_language_model else predict
    adapter = f"{PROG} export --to peft {path} --output_dir {shlex.quote(str(folder / 'adapter'))}"
    merge = f"{PROG} merge {path} --output_dir {shlex.quote(str(folder / 'merged'))}"
    return [*([test] if has_test else []), use, adapter if is_merged else merge]


def _existing(path: str) -> Path | None:
    return Path(path) if path and Path(path).exists() else None


def _metric_now(trainer: L.Trainer, monitor: str | None) -> str:
    value = trainer.callback_metrics.get(monitor or "")
    return "" if value is None else f" ({monitor} {float(value):.4g})"
