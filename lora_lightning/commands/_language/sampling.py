"""Sampling settings of the commands, and stop texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_lightning.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings.

    Args:
        max_new_tokens: Maximum number of tokens to generate.
        temperature: 0 decodes greedily; a larger value samples.
        top_p: Sample from the most probable tokens whose probabilities sum to this, in (0, 1].
        top_k: Sample from this many of the most probable tokens; 0 means all.
        repetition_penalty: Above 1, tokens that prompt or answer already hold become less likely; 1 has no effect.
        stop: Texts that end an answer; the answer does not contain them.

    Raises:
        ConfigError: A value is out of its range, or has no effect.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check every value."""
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (is_right, expected) in ranges.items():
            if not is_right:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected {expected}.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ConfigError(
                "top_p and top_k choose among tokens that are drawn, and at temperature 0 none is drawn; set "
                "temperature above 0, or leave them out."
            )


def before_stop(text: str, stops: Sequence[str]) -> str:
    r"""Return a text up to the first of some texts in it.

    Example:
        >>> before_stop("4\n\nQ: 3 + 3", ["Q:", "\n\n"])
        '4'
    """
    starts = [text.find(stop) for stop in stops]
    return text[: min((start for start in starts if start >= 0), default=len(text))]


class StopWriter:
    """Passes on words up to a stop text, and holds back text that may be the start of one.

    Args:
        stops: The stop texts.
        write: Called with the words.

    Example:
        >>> writer = StopWriter(["END"], print)
        >>> writer.write("one,E")
        one,
        >>> writer.write("LSE,E")
        ELSE,
        >>> writer.write("ND,three")
        >>> writer.close()
    """

    def __init__(self, stops: Sequence[str], write: Callable[[str], object]) -> None:
        self._stops, self._write = stops, write
        self._held = ""
        self._is_over = False

    def write(self, text: str) -> None:
        """Add words."""
        if self._is_over:
            return
        text = self._held + text
        shown = before_stop(text, self._stops)
        self._is_over = len(shown) < len(text)
        self._held = "" if self._is_over else self._start_of_stop(text)
        self._hand_on(shown.removesuffix(self._held))

    def close(self) -> None:
        """Pass on the text that was held back and is not a stop text."""
        self._hand_on(self._held)
        self._held = ""

    def _start_of_stop(self, text: str) -> str:
        """Return the longest suffix of a text that is a prefix of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        ends = [text[-length:] for length in range(min(longest, len(text)), 0, -1)]
        return next((end for end in ends if any(stop.startswith(end) for stop in self._stops)), "")

    def _hand_on(self, text: str) -> None:
        if text:
            self._write(text)
