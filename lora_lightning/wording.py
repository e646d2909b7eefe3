"""How messages to the user are worded: on one line, with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_NAMES = 12


def one_line(text: object) -> str:
    r"""Join all lines and runs of blanks of a text into one line.

    Example:
        >>> one_line("first\n   second")
        'first second'
    """
    return " ".join(str(text).split())


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known names that are nearest to a misspelt one, best first; upper and lower case count the same.

    Example:
        >>> nearest("LoRa", ["DoRA", "LoRA", "Prefix"])[0]
        'LoRA'
    """
    by_lower: dict[str, str] = {}
    for candidate in known:
        by_lower.setdefault(candidate.lower(), candidate)
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=count)]


def suggestion(name: str, known: Iterable[str], label: str = "known here") -> str:
    """Return what to write instead of a misspelt name: the nearest one, else a list of what there is.

    Example:
        >>> suggestion("metod", ["backbone", "method"])
        'did you mean `method`?'
        >>> suggestion("xyz", ["backbone", "method"])
        'known here: backbone, method'
    """
    names = sorted(set(known))
    near = nearest(name, names)
    if near:
        return f"did you mean `{near[0]}`?"
    if not names:
        return "nothing can be set here"
    return f"{label}: {', '.join(names[:MAX_NAMES])}{', …' if len(names) > MAX_NAMES else ''}"
