"""Read and check the values of an `adapter_config.json`, before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import CheckpointError

_REQUIRED = object()

# What PEFT writes that changes nothing about what an adapter computes.
IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_class",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "lora_ga_config",
        "megatron_core",
        "parent_library",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)


@dataclass(frozen=True)
class Field:
    """One value of a config.

    Args:
        name: Its name here.
        expected: Description of valid values.
        is_valid: The test for valid values.
        default: Meaning of null or a missing value; without a default, the value is required.
    """

    name: str
    expected: str
    is_valid: Callable[[Any], bool]
    default: Any = _REQUIRED


def read_fields(data: Mapping[str, Any], fields: Mapping[str, Field], source: str) -> dict[str, Any]:
    """Return the values of a config by our names.

    Args:
        data: The JSON object.
        fields: The fields to read, by PEFT's names.
        source: Where it came from, for messages.

    Raises:
        CheckpointError: A value is missing or of the wrong kind.
    """
    values: dict[str, Any] = {}
    for key, field in fields.items():
        value = data.get(key)
        if value is None:
            if field.default is _REQUIRED:
                raise CheckpointError(f"{source}: {key} is missing; it must be {field.expected}.")
            value = field.default
        elif not field.is_valid(value):
            raise CheckpointError(f"{source}: {key} must be {field.expected}, got {value!r:.80}.")
        values[field.name] = value
    return values


def refuse_unknown(data: Mapping[str, Any], known: Collection[str], what: str, source: str) -> None:
    """Refuse options that are set but unknown here, since they may change the result.

    Args:
        data: The JSON object.
        known: The names that are read or have no effect.
        what: What this library computes, such as `plain LoRA, rsLoRA and DoRA`.
        source: Where it came from, for messages.

    Raises:
        CheckpointError: There are some, of today's PEFT or of a version yet to come.
    """
    used = sorted(key for key, value in data.items() if key not in known and key not in IGNORED and value)
    if used:
        raise CheckpointError(
            f"{source}: {', '.join(f'{key}={data[key]!r:.40}' for key in used[:3])} is not supported: this library "
            f"computes {what}. Merge the adapter with PEFT, or train one without it."
        )


def is_flag(value: object) -> bool:
    """Return whether a value is true or false."""
    return isinstance(value, bool)


def is_count(value: object) -> bool:
    """Return whether a value is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    """Return whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_share(value: object) -> bool:
    """Return whether a value is a number from 0 and below 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def is_text(value: object) -> bool:
    """Return whether a value is a text."""
    return isinstance(value, str)


def is_names(value: object) -> bool:
    """Return whether a value is a list of texts that are not empty."""
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def is_names_or_text(value: object) -> bool:
    """Return whether a value is a text or a list of texts."""
    return is_text(value) or is_names(value)


def is_wholes(value: object) -> bool:
    """Return whether a value is a list of whole numbers from 0, or one of them."""
    items: Iterable[object] = value if isinstance(value, list) else [value]
    return all(is_whole(item) for item in items)


def is_map_of(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    """Return the test for an object whose values all pass `is_value`."""
    return lambda value: (
        isinstance(value, dict) and all(isinstance(key, str) and is_value(item) for key, item in value.items())
    )


NAMES = "a list of names or null"

# What the config of every kind of adapter holds.
COMMON = {
    "base_model_name_or_path": Field("base", "a text or null", is_text, None),
    "modules_to_save": Field("modules_to_save", NAMES, is_names, []),
    "task_type": Field("task_type", "a text or null", is_text, None),
}

# What those hold that choose modules by name.
TARGETS = {
    **COMMON,
    "target_modules": Field("target_modules", "a list of names, a text or null", is_names_or_text, None),
    "exclude_modules": Field("exclude_modules", "a list of names, a text or null", is_names_or_text, None),
    "layers_to_transform": Field("layers_to_transform", "whole numbers from 0, or null", is_wholes, None),
    "layers_pattern": Field("layers_pattern", "a list of names, a text or null", is_names_or_text, ""),
}
