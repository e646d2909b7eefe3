"""Messages of other libraries that a run does not print, each with its reason."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

HIDDEN_MESSAGES = {
    "💡 Tip:": "an advertisement",
    "Trainer already configured with model summary": "true of every run, since AdapterSummary is a default",
    "GPU available:": "the first line of the training names the device",
    "TPU available:": "the same",
    "LOCAL_RANK:": "the same",
    "Loading `train_dataloader` to estimate": "happens in every run",
    "Restored all states from the checkpoint": "says again that the checkpoint was restored",
    "Loaded model weights from the checkpoint": "the same",
}
"""Beginnings of messages that Lightning logs at the level `info`, with the reason to hide each."""

HIDDEN_WARNINGS = {
    ".*LeafSpec.*": "Lightning calls a function that torch deprecates",
    ".*does not have many workers.*": "texts that are tokenized beforehand need no workers",
    ".*could not find the monitored key.*": "no validation ran, which the end of the run says; other names are refused",
}
"""Regular expressions of warnings, with the reason to hide each."""

HIDDEN_IN_EVALUATIONS = {
    "The dirpath has changed from": "said of a run's checkpoints, which an evaluation does not continue",
    "Be aware that when using `ckpt_path`": "the callbacks of the training do nothing in an evaluation",
}
"""Beginnings of warnings that only a fit needs, with the reason to hide each."""

_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
_BAR_SWITCHES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def hide_bars() -> None:
    """Disable the progress bars of Hugging Face's libraries in a file or pipe; call it before they are imported.

    A bar redraws its line, which leaves hundreds of copies in a log. Variables that the user set are kept.
    """
    if not sys.stderr.isatty():
        for name in _BAR_SWITCHES:
            os.environ.setdefault(name, "1")


@contextmanager
def tidy_output(*, is_fit: bool) -> Iterator[None]:
    """Inside the block, send Lightning's messages to stdout and hide uninformative ones.

    Stderr then holds only warnings and errors.

    Args:
        is_fit: Whether the block trains.
    """
    with _tidy_log(), warnings.catch_warnings():
        for pattern in HIDDEN_WARNINGS:
            warnings.filterwarnings("ignore", message=pattern)
        for pattern in () if is_fit else HIDDEN_IN_EVALUATIONS:
            warnings.filterwarnings("ignore", message=pattern)
        yield


@contextmanager
def _tidy_log() -> Iterator[None]:
    handlers = [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
    printing = [handler for handler in handlers if type(handler) is logging.StreamHandler]
    streams = [handler.stream for handler in printing]
    try:
        for handler in printing:
            handler.setStream(sys.stdout)
            handler.addFilter(_tells_something)
        yield
    finally:
        for handler, stream in zip(printing, streams, strict=True):
            handler.setStream(stream)
            handler.removeFilter(_tells_something)


def _tells_something(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return bool(message.strip()) and not message.startswith(tuple(HIDDEN_MESSAGES))
