"""The task that wrote a checkpoint: find its class without running untrusted code, and build it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.imports import import_class
from lora_lightning.keywords import parameters_taken
from lora_lightning.trust import LIBRARY, check_import

if TYPE_CHECKING:
    import lightning as L

_OLD_CLASS_PATH = "_class_path"
"""Key of the class among the settings in version 0.1."""


def class_path_in(content: Mapping[str, Any]) -> str | None:
    """Return the import path of the task that wrote a checkpoint, or None if it does not say."""
    entry = content.get("lora_lightning")
    found = entry.get("task") if isinstance(entry, Mapping) else None
    found = found or content["hyper_parameters"].get(_OLD_CLASS_PATH)
    return found if isinstance(found, str) else None


def class_path_of(cls: type[Any]) -> str:
    """Return the import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def settings_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the task that wrote a checkpoint, without other entries."""
    return {key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")}


def given_in(content: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the arguments that the task of a checkpoint was built with, or None if it does not say."""
    entry = content.get("lora_lightning")
    given = entry.get("arguments") if isinstance(entry, Mapping) else None
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else None


def find_task_class(stored: str | None, name: str | None, path: Path) -> type[L.LightningModule]:
    """Return the class of the task that wrote a checkpoint.

    Args:
        stored: The import path that the checkpoint names.
        name: The import path that the user names, which takes precedence and is trusted.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: There is no such class, or it would have to be imported on the checkpoint's word alone.
    """
    import lightning as L

    wanted = name or stored
    if not isinstance(wanted, str) or "." not in wanted:
        raise CheckpointError(f"{path} does not say which task wrote it; name its class, as in my_module.MyTask.")
    check_import(wanted, "--task_class" if name else str(path))
    module_name, _, _ = wanted.rpartition(".")
    is_trusted = name is not None or module_name in sys.modules or module_name.split(".")[0] == LIBRARY
    if not is_trusted:
        raise CheckpointError(
            f"{path} was written by the task {wanted}, which is not part of lora_lightning, and importing it runs its "
            f"code. If you trust it, say so: --task_class {wanted}"
        )
    try:
        return import_class(wanted, L.LightningModule, "--task_class" if name else str(path))
    except ConfigError as error:
        raise CheckpointError(f"The task {wanted} of {path} cannot be used: {error}") from error


def arguments_given(cls: type[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a constructor was called with by name, those inside `*args` and `**kwargs` too.

    Arguments in `*args` are assumed to be passed to the next class's constructor.

    Example:
        >>> class Task:
        ...     def __init__(self, width, **kwargs): ...
        >>> arguments_given(Task, (3,), {"dtype": "auto"})
        {'width': 3, 'dtype': 'auto'}
    """
    try:
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
    except (TypeError, ValueError):  # the constructor itself says what is wrong
        return {}
    given = dict(list(bound.arguments.items())[1:])  # the first is the object itself
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest = given.pop(parameter.name, ())
            above = next((base for base in cls.__mro__[1:] if "__init__" in vars(base)), object)
            given |= arguments_given(above, rest, {}) if rest else {}
    return given


def constructor_arguments(
    cls: type[Any], settings: Mapping[str, Any], given: Iterable[str] | None = None
) -> dict[str, Any]:
    """Return the settings to call a task's constructor with.

    Args:
        cls: The task's class.
        settings: All settings that the checkpoint holds.
        given: Names of the arguments that the checkpoint's task was built with; None if it does not say.

    Returns:
        The settings that the constructor and those that it forwards to name; and if a class outside this library takes
        `**kwargs`, those that went through them.
    """
    parameters, is_open = parameters_taken(cls)
    named = set(parameters)
    if is_open:
        named |= settings.keys() if given is None else set(given)
    return {name: value for name, value in settings.items() if name in named}


def build_task(
    cls: type[L.LightningModule],
    content: dict[str, Any],
    path: Path,
    changes: Mapping[str, Any],
    *,
    strict: bool | None = None,
) -> L.LightningModule:
    """Build the task of a checkpoint with its model, and load its weights.

    Args:
        cls: The task's class.
        content: What the checkpoint holds.
        path: The checkpoint, for messages.
        changes: Settings to take instead of the checkpoint's.
        strict: As Lightning's `load_state_dict` takes it; None means the task's own.

    Raises:
        CheckpointError: The settings do not fit the class, or the weights or the base do not fit the model.
    """
    entry = content.get("lora_lightning")
    if isinstance(entry, Mapping) and "parts" in entry:
        raise CheckpointError(
            f"{path} was written with AdapterFinetuning. Load it with lora_lightning.load_finetuned, and merge it with "
            "lora_lightning.merge_finetuned."
        )
    settings = settings_in(content)
    arguments = {**constructor_arguments(cls, settings, given_in(content)), **changes}
    _warn_of_lost(cls, set(given_in(content) or ()) - settings.keys() - changes.keys(), path)
    try:
        task = cls(**arguments)
    except TypeError as error:
        raise CheckpointError(
            f"The settings in {path} do not fit {cls.__qualname__} ({error}): it was written by another version, or "
            "an argument of __init__ is not kept; call self.keep_settings(argument=argument) there."
        ) from error
    task.strict_loading = task.strict_loading if strict is None else strict
    task.configure_model()
    task.on_load_checkpoint(content)
    task.load_state_dict(content["state_dict"], strict=task.strict_loading)
    return task


def _warn_of_lost(cls: type[Any], lost: set[str], path: Path) -> None:
    """Warn that a task was built with arguments that its checkpoint does not hold: the defaults may act otherwise."""
    from lightning.pytorch.utilities import rank_zero_warn

    if not lost:
        return
    rank_zero_warn(
        f"{path} does not hold the arguments {', '.join(sorted(lost))} that its {cls.__name__} was built with, since "
        "they are not plain types; their defaults are used. Pass them to load_from_checkpoint, or keep a plain form "
        "with self.keep_settings(...) in __init__."
    )
