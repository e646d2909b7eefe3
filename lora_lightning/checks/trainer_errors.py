"""Errors in settings that Lightning reports with general exceptions."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path

import lightning as L

from lora_lightning.errors import ConfigError, UserError, trouble_of_disk

_LIGHTNING = Path(L.__file__).parent
_LIBRARY = Path(__file__).parent.parent
_LOGGERS = _LIGHTNING / "pytorch" / "loggers"
_CALLBACKS = _LIGHTNING / "pytorch" / "callbacks"


def mistake_of_settings(error: BaseException) -> ConfigError | None:
    """Return what to change if Lightning or the package of a logger refuses a setting, or None for any other error.

    Lightning raises ValueError for settings that contradict the data, and its callbacks raise RuntimeError for metrics
    that are missing, which a task of the user's own may cause after the first epoch.

    Args:
        error: What a run has raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename) if frames else Path()
    in_loggers = any(Path(frame.filename).is_relative_to(_LOGGERS) for frame in frames)
    if isinstance(error, ModuleNotFoundError) and error.name and in_loggers:
        package = error.name.partition(".")[0]
        return ConfigError(f"The logger needs the package {package}, which cannot be imported: pip install {package}.")
    is_foreign = not (raised_in.is_relative_to(_LIGHTNING) or raised_in.is_relative_to(_LIBRARY))
    if in_loggers and is_foreign and not isinstance(error, UserError) and trouble_of_disk(error) is None:
        text = " ".join(str(error).split()) or type(error).__name__
        return ConfigError(f"A logger of trainer.logger ends the run: {text} Mend that, or leave this logger out.")
    is_value = isinstance(error, ValueError) and raised_in.is_relative_to(_LIGHTNING)
    is_callback = isinstance(error, RuntimeError) and raised_in.is_relative_to(_CALLBACKS)
    if not (is_value or is_callback):
        return None
    text = " ".join(str(error).split())
    for pattern, sentence in _SENTENCES:
        match = re.search(pattern, text)
        if match is not None:
            return ConfigError(sentence(match))
    return ConfigError(text)


def _beyond_epoch(match: re.Match[str]) -> str:
    return (
        f"trainer.val_check_interval is {match[1]}, but an epoch has {match[2]} batches; set at most {match[2]}, or "
        "trainer.check_val_every_n_epoch: null to count across epochs."
    )


def _not_available(match: re.Match[str]) -> str:
    known = ", ".join(re.findall(r"`([^`]+)`", match[2]))
    return f"EarlyStopping monitors `{match[1]}`, which was not logged; logged were {known}."


_SENTENCES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"`val_check_interval` \((\d+)\) must be .* training batches \((\d+)\)", _beyond_epoch),
    (r"Early stopping conditioned on metric `([^`]*)` which is not available\.(.*)", _not_available),
)
