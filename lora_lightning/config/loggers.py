"""Loggers named in one line: those that need a folder get that of the runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger

from lora_lightning.config.settings import CLASS_PATH, INIT_ARGS, collect
from lora_lightning.config.signatures import find_class, parameters_of_function

_FOLDER = "save_dir"


def with_logger_folders(arguments: Sequence[str], root: str) -> list[str]:
    """Return a command line that gives loggers without a folder the folder of the runs.

    `logger: TensorBoardLogger` then writes into the run's own folder, beside checkpoints and settings: into
    `<root>/version_<k>`, as the logger of a run without settings does.

    Args:
        arguments: The words after the subcommand.
        root: The folder of the runs if `trainer.default_root_dir` names none.
    """
    trainer = collect(arguments).tree.get("trainer")
    if not isinstance(trainer, dict):
        return list(arguments)
    given = trainer.get("logger")
    folder = str(trainer.get("default_root_dir") or root)
    _allow_local_store(given)
    completed = [_completed(one, folder) for one in given] if isinstance(given, list) else _completed(given, folder)
    if completed == given:
        return list(arguments)
    return [*arguments, f"--trainer.logger={json.dumps(completed)}"]


def _allow_local_store(given: object) -> None:
    """Let an MLFlowLogger without further settings write into `./mlruns`, its default.

    MLflow 3 refuses folders as stores unless this variable is set.
    """
    if "MLFlowLogger" in str(given):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def _required_of(cls: type) -> frozenset[str]:
    return parameters_of_function(cls.__init__).required  # type: ignore[misc]  # asked of a class, on purpose


def _completed(spec: Any, folder: str) -> Any:  # noqa: ANN401 - values out of YAML are of any type
    """Return a logger's class and settings, with a folder if it needs one; anything else as it is."""
    named = spec.get(CLASS_PATH) if isinstance(spec, dict) else spec
    cls = find_class(named, Logger) if isinstance(named, str) else None
    if cls is None or _FOLDER not in _required_of(cls):
        return spec
    settings = dict((spec.get(INIT_ARGS) if isinstance(spec, dict) else None) or {})
    if settings.get(_FOLDER) is not None:
        return spec
    # Lightning would put its runs into a folder `lightning_logs` in between.
    return {CLASS_PATH: named, INIT_ARGS: {"name": "", **settings, _FOLDER: folder}}
