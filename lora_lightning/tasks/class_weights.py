"""Weights of classes in the loss: by name, or inversely proportional to class frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from lora_lightning.errors import ConfigError

ClassWeights: TypeAlias = dict[str | int, float] | Literal["balanced"]
"""Weights by label, or `balanced`."""

# YAML reads these names as true and false.
_WORDS = {True: ("true", "yes", "on"), False: ("false", "no", "off")}


def weights_by_name(weights: Mapping[str | int, float], names: Sequence[str]) -> dict[str, float]:
    """Return the weights by class name; numbers and booleans as keys become names.

    Args:
        weights: The weights as the user gives them; classes left out weigh 1.
        names: The names of the classes.

    Raises:
        ConfigError: A key is not a class, a weight is negative or not finite, or all weights are 0.

    Example:
        >>> weights_by_name({1: 5.0}, ["0", "1"])
        {'1': 5.0}
    """
    by_name = {_name_of(key, names): float(weight) for key, weight in weights.items()}
    unknown = [name for name in by_name if name not in names]
    if unknown:
        raise ConfigError(
            f"class_weights names {', '.join(unknown)}, and the labels are {', '.join(names)}. Use these names as keys."
        )
    wrong = {name: weight for name, weight in by_name.items() if weight < 0 or not math.isfinite(weight)}
    if wrong:
        name, weight = next(iter(wrong.items()))
        raise ConfigError(f"class_weights gives {name!r} the weight {weight}; expected a number of at least 0.")
    if len(by_name) == len(names) and not any(by_name.values()):
        raise ConfigError("class_weights gives every label the weight 0; give at least one a positive weight.")
    return by_name


def balanced_weights(counts: Mapping[str, int] | None, names: Sequence[str]) -> dict[str, float]:
    """Return weights that balance the classes: n / (number of classes x rows of the class).

    Args:
        counts: How many training rows each label has; None if the data module does not count them.
        names: The names of the classes; one that does not occur weighs 1.

    Raises:
        ConfigError: There are no counts.

    Example:
        >>> balanced_weights({"a": 30, "b": 10}, ["a", "b"])
        {'a': 0.6666666666666666, 'b': 2.0}
    """
    if not counts:
        raise ConfigError(
            "class_weights: balanced needs a data module that counts the training labels (`label_counts`), and there "
            "is none. Use TextClassificationData, or give the weights by name."
        )
    present = {name: counts[name] for name in names if counts.get(name)}
    total, num_classes = sum(present.values()), len(present)
    balanced = {name: total / (num_classes * count) for name, count in present.items()}
    return {name: balanced.get(name, 1.0) for name in names}


def _name_of(key: str | int, names: Sequence[str]) -> str:
    if isinstance(key, bool):
        meant = [name for name in names if name.lower() in _WORDS[key]]
        return meant[0] if len(meant) == 1 else str(key)
    return str(key).strip()
