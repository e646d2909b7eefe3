"""The data settings in a checkpoint, for commands that use its model on other rows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import lightning as L

from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.config.saved_model import KEYWORDS
from lora_lightning.config.settings import CLASS_PATH, INIT_ARGS, SPEC_KEYS, collect, flag_value
from lora_lightning.config.signatures import find_class, subclasses
from lora_lightning.data.predicted_rows import SOURCES, settings_to_use
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.trust import LIBRARY, check_import


def named_checkpoint(arguments: list[str]) -> str | None:
    """Return the checkpoint that a command line names without naming a data module; None for any other."""
    tree = collect(arguments).tree
    data, path = tree.get("data"), tree.get("ckpt_path") or flag_value(arguments, "ckpt_path")
    has_class = isinstance(data, str) or (isinstance(data, Mapping) and CLASS_PATH in data)
    return path if isinstance(path, str) and path not in KEYWORDS and not has_class else None


def known_data_modules() -> str:
    """Return the short names of the data modules, for messages."""
    return ", ".join(sorted(subclasses(L.LightningDataModule).keys() - {L.LightningDataModule.__name__}))


def data_class_of(run: SavedRun | None, arguments: list[str]) -> str | None:
    """Return the import path of the data module that a command line takes from a checkpoint; None if it takes none.

    Args:
        run: The checkpoint, where one is named and no data module.
        arguments: The command line.

    Raises:
        CheckpointError: The class would have to be imported on the checkpoint's word alone.
        ConfigError: There are settings of a data module, and nothing names it.
    """
    class_path = None if run is None else _saved_class(run)
    if class_path is None:
        _refuse_unnamed(arguments)
    return class_path


def _refuse_unnamed(arguments: list[str]) -> None:
    data = collect(arguments).tree.get("data")
    keys = [] if not isinstance(data, Mapping) or CLASS_PATH in data else [key for key in data if key not in SPEC_KEYS]
    if keys:
        raise ConfigError(
            f"`data.{keys[0]}` is set, but no data module is named, and no checkpoint that knows one; name it with "
            f"--data in front of its settings ({known_data_modules()})."
        )


def _saved_class(run: SavedRun) -> str | None:
    """Return the import path of the data module that trained a checkpoint, if it is known and its settings are."""
    class_path = run.data_class_path
    if class_path is None:
        return None
    check_import(class_path, str(run.path))
    module = class_path.rpartition(".")[0]
    if module not in sys.modules and module.split(".")[0] != LIBRARY:
        raise CheckpointError(
            f"{run.path} names the data module {class_path}, which is not part of lora_lightning, and importing it "
            "runs its code. If you trust it, name it in the config or with --data."
        )
    cls = find_class(class_path, L.LightningDataModule)
    return None if cls is None or run.data_settings(cls) is None else class_path


def data_of_run(run: SavedRun, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the data settings of a checkpoint that the user left open, as `{class_path, init_args}`.

    Args:
        run: The checkpoint.
        given: The data settings that the user wrote, in the same form. If they name a source, those of the training
            are omitted.

    Returns:
        The settings; None if the checkpoint was trained with another data module, or holds none.
    """
    cls = find_class(given[CLASS_PATH], L.LightningDataModule)
    saved = None if cls is None else run.data_settings(cls)
    if saved is None:
        return None
    mine = given.get(INIT_ARGS) or {}
    names_source = any(mine.get(name) is not None for name in SOURCES)
    left_open = settings_to_use(saved, run.facts, names_source=names_source)
    settings = {name: value for name, value in left_open.items() if name not in mine}
    return {CLASS_PATH: given[CLASS_PATH], INIT_ARGS: settings}
