"""Regular expressions that come from users, configs and strangers' adapters: matched within a time limit."""

from __future__ import annotations

from functools import lru_cache

import regex

from lora_lightning.errors import ConfigError

MATCH_SECONDS = 0.5
"""How long one match may take; the paths of a model take microseconds."""
MAX_LENGTH = 10_000


def compile_pattern(pattern: str, setting: str) -> regex.Pattern[str]:
    """Compile a regular expression; the syntax is that of Python's `re`.

    Args:
        pattern: The expression.
        setting: The setting or file that holds it, for messages.

    Raises:
        ConfigError: It is malformed, or too long for one.
    """
    if len(pattern) > MAX_LENGTH:
        raise ConfigError(
            f"{setting}: a regular expression of {len(pattern)} characters is not read (at most {MAX_LENGTH}); "
            "write it shorter, or name the modules in a list."
        )
    try:
        return _compiled(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{setting}: {pattern!r} is no valid regular expression ({error}).") from error


def match_start(pattern: str, text: str, setting: str, *, whole: bool = False) -> regex.Match[str] | None:
    """Match a regular expression at the start of a text, as `re.match` does, within the time limit.

    Python's `re` has no time limit, and backtracking can take longer than anybody waits: `(a|aa)+` doubles its work
    every other letter. The `regex` package, which reads the same syntax, has one.

    Args:
        pattern: The expression.
        text: The text, such as a module path.
        setting: The setting or file that holds the expression, for messages.
        whole: Match all of the text, as `re.fullmatch` does.

    Raises:
        ConfigError: It is malformed, or takes longer than `MATCH_SECONDS`.
    """
    compiled = compile_pattern(pattern, setting)
    try:
        return (compiled.fullmatch if whole else compiled.match)(text, timeout=MATCH_SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            f"{setting}: the regular expression {pattern!r:.80} runs away (more than {MATCH_SECONDS} s on {text!r:.80}"
            "); write it without repetitions inside repetitions, or name the modules in a list."
        ) from error


def matches_whole(pattern: str, text: str, setting: str) -> bool:
    r"""Return whether a regular expression matches a whole text; see `match_start`.

    Example:
        >>> matches_whole(r".*\.(query|value)", "layer.0.query", "target_modules")
        True
    """
    return match_start(pattern, text, setting, whole=True) is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)
