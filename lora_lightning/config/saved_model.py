"""The model settings in a checkpoint, and their comparison with those that the user gives too."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lightning.checkpoint.folder import is_adapter_folder
from lora_lightning.checkpoint.pair import folder_of
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.config.settings import CLASS_PATH, INIT_ARGS
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.trust import LIBRARY, check_import

KEYWORDS = frozenset({"last", "best", "hpc"})
"""Keywords that Lightning accepts instead of a file."""


def saved_model(run: SavedRun) -> dict[str, Any]:
    """Return the model of a checkpoint as `{class_path, init_args}`.

    Args:
        run: The `.ckpt` file.

    Raises:
        CheckpointError: It names classes that would have to be imported on its word alone.
    """
    path = run.path
    try:
        cls = run.task_class()
    except CheckpointError as error:  # the subcommands of Lightning name the task with --model
        raise CheckpointError(str(error).replace("--task_class", "--model")) from error
    settings = run.arguments_for(cls)
    for class_path in _class_paths(settings.get("method")):
        check_import(class_path, str(path))
        module = class_path.rpartition(".")[0]
        if module not in sys.modules and module.split(".")[0] != LIBRARY:
            raise CheckpointError(
                f"{path} names the method {class_path}, which is not part of lora_lightning, and importing it runs its "
                "code. If you trust it, name it in the config or with --model.method."
            )
    return {CLASS_PATH: f"{cls.__module__}.{cls.__qualname__}", INIT_ARGS: settings}


def refuse_conflict(
    given: Mapping[str, Any], saved: Mapping[str, Any], path: Path, ignored: frozenset[str], *, trains: bool
) -> None:
    """Refuse model settings that contradict a checkpoint, since one of the two would be ignored silently.

    Args:
        given: Only the settings that the user wrote, `{class_path, init_args}`.
        saved: The same of the checkpoint, with all settings.
        path: The checkpoint, for the message.
        ignored: Names of `init_args` that may differ.
        trains: Whether training continues, and so may start from the adapter instead.

    Raises:
        ConfigError: A setting differs.
    """
    folder = folder_of(path)
    shown = folder if is_adapter_folder(folder) else "the adapter folder of a checkpoint"
    instead = (
        f"leave the setting out to resume the run; or leave --ckpt_path out and give `adapter: {shown}` "
        f"(model.{INIT_ARGS}.adapter), which starts a new run from that adapter with other settings"
        if trains
        else "leave the setting out, or run without the checkpoint"
    )
    for key, mine, theirs in sorted(_differences(given, saved, "model"), key=lambda difference: difference[0]):
        if key.removeprefix(f"model.{INIT_ARGS}.").split(".")[0] in ignored:
            continue
        raise ConfigError(
            f"`{key}` is {mine!r} here, but the checkpoint {path} was trained with {theirs!r}; {instead}."
        )


def _differences(mine: Any, theirs: Any, key: str) -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401 - plain data
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for name in mine.keys() & theirs.keys():
            yield from _differences(mine[name], theirs[name], f"{key}.{name}")
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for position, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            yield from _differences(one, other, f"{key}.{position}")
    elif mine is not None and mine != theirs and not (key.endswith(CLASS_PATH) and _is_same_class(mine, theirs)):
        yield key, mine, theirs


def _is_same_class(mine: str, theirs: str) -> bool:
    """Return whether two import paths lead to one class, as a package's short path and the module's own do."""
    first, second = (
        getattr(sys.modules.get(path.rpartition(".")[0]), path.rpartition(".")[2], None) for path in (mine, theirs)
    )
    return first is not None and first is second


def _class_paths(value: Any) -> Iterator[str]:  # noqa: ANN401 - plain data of any shape
    if isinstance(value, Mapping):
        if isinstance(value.get(CLASS_PATH), str):
            yield value[CLASS_PATH]
        for inner in value.values():
            yield from _class_paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_paths(inner)
