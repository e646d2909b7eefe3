"""Finds the intended setting of an unknown name, or of one in the wrong section."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from lora_lightning.adapters import Method
from lora_lightning.config.right_words.foreign_names import CALLBACKS, SETTINGS, VALUES
from lora_lightning.config.settings import CLASS_PATH, INIT_ARGS
from lora_lightning.config.signatures import (
    Parameters,
    alternatives,
    find_class,
    is_class_type,
    parameters_of,
    subclasses,
)
from lora_lightning.methods import LoRA
from lora_lightning.wording import nearest

_SEVERAL = 3
"""Number of sections with a setting of one name up to which all are listed."""


def right_setting(name: str, known: Collection[str], *, as_flag: bool) -> str | None:
    """Return the spelling of the setting that an unknown name means, or None if that is not certain.

    Args:
        name: What the user wrote, as a flag without dashes: `lr`, `optim.lr`, `trainer.learning_rate`.
        known: The settings that there are, written the same way.
        as_flag: Whether to return a flag, not a key.

    Example:
        >>> known = ["model.optim.lr", "data.batch_size", "trainer.precision", "trainer.max_epochs"]
        >>> right_setting("num_train_epochs", known, as_flag=True)
        '`--trainer.max_epochs`'
        >>> right_setting("trainer.fp16", known, as_flag=False), right_setting("batch_size", known, as_flag=True)
        ('`trainer.precision: 16-mixed`', '`--data.batch_size`')
    """
    plain = name.replace("-", "_")
    last = plain.rpartition(".")[2].lower()
    if last in CALLBACKS:
        return CALLBACKS[last]
    for target in SETTINGS.get(last, ()):
        setting, _, value = target.partition("=")
        if setting in known and setting != plain:
            return _written(setting, value, as_flag=as_flag)
    ends = [one for one in known if one.endswith(f".{plain}")] or [one for one in known if one.endswith(f".{last}")]
    if 0 < len(ends) <= _SEVERAL:
        return " or ".join(_written(one, "", as_flag=as_flag) for one in ends)
    return None


def right_value(hint: Any, value: object) -> str | None:  # noqa: ANN401 - type hints have no common type
    """Return the intended value of a type with a fixed set of words, or None.

    Example:
        >>> right_value(Literal["16-mixed", "32-true"], "fp16"), right_value(Literal["linear", "cosine"], "cosin")
        ('16-mixed', 'cosine')
    """
    words = [
        word
        for part in alternatives(hint)
        if get_origin(part) is Literal
        for word in get_args(part)
        if isinstance(word, str)
    ]
    if not isinstance(value, str) or not words:
        return None
    meant = VALUES.get(value.lower().replace("-", "_"))
    if meant in words:
        return meant
    return next(iter(nearest(value, words)), None)


def settings_known(schema: Parameters, tree: Mapping[str, Any]) -> list[str]:
    """Return all settings of a command as flags have them, without dashes; those of classes too.

    Args:
        schema: The type of each top-level setting.
        tree: What the user wrote, which names the classes.

    Example:
        >>> settings_known(Parameters({"trainer": Parameters({"max_epochs": int}), "seed": int}), {})
        ['trainer', 'trainer.max_epochs', 'seed']
    """
    return [name for top, hint in schema.types.items() for name in _of_type(top, hint, tree.get(top))]


def _of_type(path: str, hint: Any, given: Any) -> Iterator[str]:  # noqa: ANN401 - any type hint, any value out of YAML
    yield path
    if isinstance(hint, Parameters):
        for name in hint.types:
            yield f"{path}.{name}"
        return
    for base in alternatives(hint):
        if is_class_type(base):
            yield from _of_class(path, base, given)


def _of_class(path: str, base: type, given: Any) -> Iterator[str]:  # noqa: ANN401 - any value out of YAML
    """Yield the settings of the class that is named; of every class that could be if none is."""
    named = given.get(CLASS_PATH) if isinstance(given, dict) else given
    cls = find_class(named, base) if isinstance(named, str) else None
    inside = given.get(INIT_ARGS, given) if isinstance(given, dict) else None
    if cls is None and issubclass(LoRA, base):
        cls = LoRA
    candidates = [cls] if cls is not None else [base, *subclasses(base).values()]
    types = {name: hint for one in candidates for name, hint in parameters_of(one).types.items()}
    for name, hint in types.items():
        yield f"{path}.{name}"
        for part in alternatives(hint):
            if isinstance(part, type) and (dataclasses.is_dataclass(part) or issubclass(part, Method)):
                value = inside.get(name) if isinstance(inside, dict) else None
                yield from (one for one in _of_class(f"{path}.{name}", part, value))


def _written(setting: str, value: str, *, as_flag: bool) -> str:
    if as_flag:
        return f"`--{setting} {value}`" if value else f"`--{setting}`"
    return f"`{setting}: {value}`" if value else f"`{setting}`"
