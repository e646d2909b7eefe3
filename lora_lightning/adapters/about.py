"""What the documentation says about a method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class About:
    """What the README, the documentation and `lora-lightning compare` say about a method.

    Args:
        trains: What it trains, for the table of methods.
        where: On which modules, for the same table.
        principle: What it changes, in a few words.
        suits: Which tasks and models it suits.
        difficulty: How hard it is to set up.
    """

    trains: str = "-"
    where: str = "-"
    principle: str = "-"
    suits: str = "-"
    difficulty: str = "-"
