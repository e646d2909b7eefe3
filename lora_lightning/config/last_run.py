"""The newest checkpoint of all runs, for `--ckpt_path last` and `--ckpt_path hpc`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.checkpoint.saved_run import SavedRun, newest_run
from lora_lightning.config.settings import INIT_ARGS
from lora_lightning.errors import ConfigError

DEFAULT_ROOT = "runs"
"""Folder of all runs if the trainer names none."""


def last_of_runs(trainer: Mapping[str, Any]) -> SavedRun:
    """Read the newest complete checkpoint of all runs, for a process that starts a new run and resumes from it.

    Lightning would look only in the folder of the new run, find no checkpoint, and start from scratch.

    Args:
        trainer: The trainer's settings.

    Raises:
        ConfigError: There is none.
    """
    root, callbacks = Path(trainer.get("default_root_dir") or DEFAULT_ROOT), trainer.get("callbacks") or []
    given = [one.get(INIT_ARGS) or {} for one in (callbacks if isinstance(callbacks, list) else [callbacks])]
    folders = [*root.glob("*/checkpoints"), *(Path(one["dirpath"]) for one in given if one.get("dirpath"))]
    newest = newest_run(folders)
    if newest is None:
        raise ConfigError(
            f"--ckpt_path last: no complete checkpoint to resume from is in {root}; name the .ckpt file, or leave "
            "the option out to start anew."
        )
    return newest


def require_requeued(trainer: dict[str, Any]) -> None:
    """Check that there is a checkpoint of a job that Lightning requeued, for `--ckpt_path hpc`.

    Args:
        trainer: The trainer's settings.

    Raises:
        ConfigError: There is none.
    """
    root = Path(trainer.get("default_root_dir") or DEFAULT_ROOT)
    if not any(root.glob("hpc_ckpt_*.ckpt")):
        raise ConfigError(
            f"--ckpt_path hpc: no requeued job left a hpc_ckpt_*.ckpt in {root}; name the .ckpt file, or leave the "
            "option out to start anew."
        )
