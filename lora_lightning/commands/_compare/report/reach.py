"""Number of steps until a method reaches the final validation loss of a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lightning.commands._compare.records import Result


def first_step(validations: list[dict[str, Any]], loss: float) -> int | None:
    """Return the first step whose validation loss is at most `loss`, or None.

    Example:
        >>> first_step([{"step": 10, "loss": 0.9}, {"step": 20, "loss": 0.5}], 0.6)
        20
    """
    return next((at["step"] for at in validations if at.get("loss") is not None and at["loss"] <= loss), None)


def steps_to_reach(finals: Mapping[int, Result], reference: Mapping[int, Result]) -> dict[int, int | None]:
    """Return, by seed, the first step at which a method has the reference's final validation loss of that seed."""
    found = {}
    for seed, result in finals.items():
        goal = reference.get(seed, {}).get("val", {}).get("loss")
        found[seed] = None if goal is None else first_step(result["validations"], goal)
    return found


def speed_ups(steps: Mapping[int, int | None], reference: Mapping[int, int | None]) -> dict[int, float | None]:
    """Return, by seed, the speed-up over the reference in steps; None if a method did not reach its loss.

    Example:
        >>> speed_ups({0: 50, 1: None}, {0: 100, 1: 100})
        {0: 2.0, 1: None}
    """
    ratios: dict[int, float | None] = {}
    for seed, step in steps.items():
        own = reference.get(seed)
        ratios[seed] = own / step if step and own else None
    return ratios
