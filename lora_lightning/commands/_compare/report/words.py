"""Descriptions of the methods that no trial measures: principle, suitable uses and difficulty."""

from __future__ import annotations

from lora_lightning.adapters.about import About
from lora_lightning.commands._compare.ends import FROZEN, FULL
from lora_lightning.commands._compare.entries import LORA_PLUS, known_names

LORA_PLUS_WORDS = About(
    trains="`optim: {lora_plus_ratio: 16}`: the rate of every `B`",
    where="every low-rank method (`A` and `B`)",
    principle="LoRA whose B learns faster than A",
    suits="LoRA that learns too slowly",
    difficulty="easy: one ratio more",
)

_NO_METHODS = {
    FROZEN: About(
        principle="only the head learns", suits="features that fit already; a lower bound", difficulty="none"
    ),
    FULL: About(
        principle="every weight learns",
        suits="much data and memory; an upper bound",
        difficulty="low rates, full checkpoints",
    ),
    LORA_PLUS: LORA_PLUS_WORDS,
}
"""The rows of a comparison without a class."""


def words_of(name: str) -> About:
    """Return the description of a row of a comparison: a method by its class's name, LoRA+, or an extreme.

    Example:
        >>> words_of("LoRA").suits, words_of("NobodysMethod").suits
        ('the usual first choice', '-')
    """
    if name in _NO_METHODS:
        return _NO_METHODS[name]
    method = known_names().get(name)
    return About() if method is None else method.about
