"""Samples out of the plain content that is kept of them."""

from __future__ import annotations

from typing import Any

from lora_lightning.data.language.conversations import Sample
from lora_lightning.data.language.turns import Message


def sample_of(content: list[Any], place: str) -> Sample:
    """Return the sample that has this content.

    Args:
        content: What `Sample.content` gave.
        place: Where the sample stands, as messages begin.

    Example:
        >>> sample = Sample("a.jsonl, line 1", (Message("user", "Hi", extra={"name": "Al"}),))
        >>> sample_of(sample.content, sample.place) == sample
        True
    """
    turns, text, plain, tools = content
    messages = tuple(_message(turn, trained=trained) for turn, trained in turns)
    return Sample(place, messages, text, tuple(plain), tuple(tools))


def _message(turn: dict[str, Any], *, trained: bool) -> Message:
    extra = {name: value for name, value in turn.items() if name not in ("role", "content")}
    return Message(turn["role"], turn["content"], trained, extra)
