"""Overlap of generated and reference texts: ROUGE and exact match."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+")


class Overlap(NamedTuple):
    """Similarity of two texts, each a number from 0 to 1.

    Args:
        exact_match: 1 where they are the same but for white space around them.
        rouge1: F1 of common words (ROUGE-1).
        rouge2: F1 of common pairs of neighbouring words (ROUGE-2).
        rougeL: F1 of the longest common subsequence of words (ROUGE-L).
    """

    exact_match: float
    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815 - the measure's own name


def overlap(generated: str, reference: str) -> Overlap:
    """Compare two texts, by ROUGE as Lin (2004) defines it, with one reference.

    Words are runs of letters and digits in lower case, of any script, not stemmed; for ASCII texts this is what
    `rouge_score` does without a stemmer.

    Example:
        >>> overlap("The cat sat.", "the cat slept")
        Overlap(exact_match=0.0, rouge1=0.6666666666666666, rouge2=0.5, rougeL=0.6666666666666666)
    """
    ours, theirs = _WORD.findall(generated.lower()), _WORD.findall(reference.lower())
    return Overlap(
        float(generated.strip() == reference.strip()),
        _common_runs(ours, theirs, 1),
        _common_runs(ours, theirs, 2),
        _f1(_longest_common(ours, theirs), len(ours), len(theirs)),
    )


def _common_runs(ours: Sequence[str], theirs: Sequence[str], length: int) -> float:
    """Return the F1 of n-grams of words, each counted as often as it occurs in both."""
    counts = [Counter(zip(*(words[start:] for start in range(length)), strict=False)) for words in (ours, theirs)]
    return _f1((counts[0] & counts[1]).total(), counts[0].total(), counts[1].total())


def _longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    before = [0] * (len(theirs) + 1)
    for word in ours:
        row = [0]
        for place, other in enumerate(theirs):
            row.append(before[place] + 1 if word == other else max(before[place + 1], row[-1]))
        before = row
    return before[-1]


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0
