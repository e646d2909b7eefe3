"""Several sources with weights, from which training rows are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lora_lightning.data.sources.record import Source
from lora_lightning.errors import ConfigError


class Part(NamedTuple):
    """A source and its weight in a mixture.

    Args:
        source: The source.
        weight: Its share of the rows that are drawn, relative to the other weights; greater than 0.
    """

    source: Source
    weight: float


def is_mixture(source: Source) -> bool:
    """Return whether a source is a list of sources with weights.

    Example:
        >>> is_mixture([{"source": "a.csv", "weight": 0.7}]), is_mixture([{"text": "a"}])
        (True, False)
    """
    if not isinstance(source, list) or not source:
        return False
    is_like_parts = all(isinstance(one, Mapping) and one.keys() <= {"source", "weight"} for one in source)
    return is_like_parts and any("weight" in one for one in source)


def parts_of(source: Source) -> list[Part]:
    """Return the parts of a mixture; another source is the only part of itself.

    Raises:
        ConfigError: A part has no source, or its weight is not a number above 0.
    """
    return list(map(_part, source)) if is_mixture(source) else [Part(source, 1.0)]


def _part(entry: Mapping[str, object]) -> Part:
    source, weight = entry.get("source"), entry.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if source is None or not is_number or not 0 < weight < math.inf:  # type: ignore[operator]  # a number by now
        raise ConfigError(
            f"train has the part {entry!r}: expected a source and a weight above 0, such as "
            "{source: a.jsonl, weight: 0.7}."
        )
    if is_mixture(source):
        raise ConfigError("A source of a mixture is a mixture itself; give all sources with their weights in one list.")
    return Part(source, float(weight))  # type: ignore[arg-type]  # checked above
