"""Several sources with weights, from which training rows are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lora_lightning.data.sources.record import Source
from lora_lightning.errors import ConfigError
from lora_lightning.paths import resolve


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
    are_like_parts = all(isinstance(one, Mapping) and one.keys() <= {"source", "weight"} for one in source)
    if are_like_parts and any("weight" in one for one in source):
        return True
    # If entries name files, a missing or mistyped weight is an error, not a row of data.
    return all(isinstance(one, Mapping) and "source" in one and _is_there(one["source"]) for one in source)


def _is_there(name: object) -> bool:
    """Return whether a local file of this name exists."""
    if not isinstance(name, str):
        return isinstance(name, list) and bool(name) and all(map(_is_there, name))
    try:
        return resolve(name).exists()
    except (OSError, ValueError):  # a long text is no path
        return False


def parts_of(source: Source) -> list[Part]:
    """Return the parts of a mixture; for another source only the source itself.

    Raises:
        ConfigError: A part has no source, or its weight is not a number above 0.
    """
    return list(map(_part, source)) if is_mixture(source) else [Part(source, 1.0)]


def _part(entry: Mapping[str, object]) -> Part:
    source, weight = entry.get("source"), entry.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    is_part = source is not None and entry.keys() <= {"source", "weight"}
    if not is_part or not is_number or not 0 < weight < math.inf:  # type: ignore[operator]  # a number by now
        raise ConfigError(
            f"train has the part {entry!r}: expected a source and a weight above 0, and nothing else, such as "
            "{source: a.jsonl, weight: 0.7}."
        )
    if is_mixture(source):
        raise ConfigError("A source of a mixture is a mixture itself; give all sources with their weights in one list.")
    return Part(source, float(weight))  # type: ignore[arg-type]  # checked above
