"""A trial of the chosen data module on the sample: used rows, labels and lengths."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lora_lightning import data as data_modules
from lora_lightning.commands._init.backbone import Backbone
from lora_lightning.commands._init.choice import DATA_MODULES, Choice
from lora_lightning.commands._init.sample import Sample
from lora_lightning.data.record_data import RecordData
from lora_lightning.errors import DataError

LONGEST = 2048
"""Largest maximum length in a config, in tokens."""
PERCENTILE = 99
"""Percentage of rows that the maximum length does not cut."""
_ROUNDED_TO = 8
_SHORTEST = 16
_CHARACTERS_OF_A_TOKEN = 4
_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Outcome of the rows of a sample.

    Args:
        num_used: Rows to train on, without copies.
        num_incomplete: Rows without a text or a target.
        num_bad: Rows that are broken or malformed.
        num_copies: Rows that are dropped as copies.
        labels: Number of rows of each label; empty for tasks without labels.
        lengths: Tokens of each row; estimated from its letters if the tokenizer is not on this machine.
        target_lengths: Tokens of each target; empty for tasks without target texts.
        is_counted: Whether the lengths were counted with the backbone's tokenizer.
    """

    num_used: int
    num_incomplete: int
    num_bad: int
    num_copies: int
    lengths: list[int]
    is_counted: bool
    labels: dict[str, int] = field(default_factory=dict)
    target_lengths: list[int] = field(default_factory=list)


def usual_length(lengths: list[int], most: int, margin: float = 1.0) -> int:
    """Return a maximum for 99 % of the lengths, a multiple of eight and at most `most`.

    Args:
        lengths: Tokens of each row.
        most: Context of the backbone, in tokens.
        margin: Factor on estimated lengths.

    Example:
        >>> usual_length([5, 9, 30], most=512), usual_length([900], most=512), usual_length([30], 512, margin=1.5)
        (32, 512, 48)
    """
    wanted = math.ceil(np.percentile(lengths, PERCENTILE, method="higher") * margin)
    rounded = max(-(-wanted // _ROUNDED_TO) * _ROUNDED_TO, _SHORTEST)
    return min(rounded, most)


def try_on(sample: Sample, choice: Choice, backbone: Backbone) -> Trial:
    """Read and encode the sample with the data module of the choice.

    Raises:
        DataError: It cannot be read, or most of its rows are malformed.
    """
    settings = {**choice.settings, "val_size": 0, "test_size": 0}
    if backbone.is_here:
        settings |= {"tokenizer": backbone.name, **_limits(choice, backbone)}
    with _quietly():
        data = build(sample, choice, settings)
        _read(data)
        if backbone.is_here:
            data.setup("fit")
        _refuse_broken(sample, data, choice)
        lengths = _counted(data) if backbone.is_here else _estimated(sample, choice)
        targets = _target_lengths(data, sample, choice, is_here=backbone.is_here)
    counts = data.counts
    return Trial(
        num_used=counts["train"],
        num_incomplete=counts["rows_incomplete"],
        num_bad=counts["rows_bad"] + (0 if sample.is_whole else sample.num_broken),
        num_copies=counts["duplicates_dropped"] + counts["contradictions_dropped"],
        labels={} if choice.problem == "regression" else dict(data.label_counts),
        lengths=lengths,
        target_lengths=targets,
        is_counted=backbone.is_here,
    )


def without_useless_splits(sample: Sample, choice: Choice) -> Sample:
    """Return a sample without the sources beside it that hold no rows to evaluate, such as tests without labels."""
    others, notes = {}, []
    for split, source in sample.others.items():
        try:
            check_splits(sample, choice, {"val_size": 0, "test_size": 0, split: source})
        except DataError as error:
            notes.append(f"{source} is not used ({str(error).rstrip('.')})")
        else:
            others[split] = source
    return replace(sample, others=others, notes=tuple(notes))


def check_splits(sample: Sample, choice: Choice, settings: dict[str, Any]) -> None:
    """Divide the sample as a config will.

    Args:
        sample: The sample.
        choice: The task.
        settings: The data module's settings in the config.

    Raises:
        DataError: The rows cannot be divided so, or another split cannot be read.
    """
    if not sample.is_whole:  # numbers of rows of the whole source are too many for the sample
        sizes = {name: _SHARE for name in ("val_size", "test_size") if settings.get(name)}
        settings = {**settings, **sizes}
    with _quietly():
        _read(build(sample, choice, {**choice.settings, **settings}))


def build(sample: Sample, choice: Choice, settings: dict[str, Any]) -> RecordData:
    """Return a data module over the sample that does not use the cache."""
    source: Any = sample.source if sample.is_whole else [dict(record) for record in sample.records]
    problem = {"problem": choice.problem} if choice.problem else {}
    module = getattr(data_modules, DATA_MODULES[choice.task])
    made: RecordData = module(
        source, **{**sample.data_settings, **problem, "cache": False, "bad_rows": "skip", **settings}
    )
    return made


def _read(data: RecordData) -> None:
    """Read and split the rows and set the labels, without a tokenizer."""
    data._read()
    data._settle_labels()


def _limits(choice: Choice, backbone: Backbone) -> dict[str, int]:
    """Return the settings with which nothing within the backbone's context is cut."""
    most = min(backbone.context or LONGEST, LONGEST)
    if choice.task == "CausalLM":
        return {}
    return {"max_length": most, "max_target_length": most} if choice.task == "Seq2SeqLM" else {"max_length": most}


def _refuse_broken(sample: Sample, data: RecordData, choice: Choice) -> None:
    bad = data._about.bad
    if len(bad) > data.counts["rows_read"] / 2:
        raise DataError(
            f"{sample.source} looks like data for {choice.task}, but {len(bad)} of {data.counts['rows_read']} rows "
            f"cannot be used; the first: {bad[0][0]} Choose with --task, --text_column and --label_column."
        )


def _counted(data: RecordData) -> list[int]:
    lengths: list[int] = [int(length) for length in data._encoded_rows("train").lengths]
    return lengths


def _target_lengths(data: RecordData, sample: Sample, choice: Choice, *, is_here: bool) -> list[int]:
    if choice.task != "Seq2SeqLM":
        return []
    if is_here:
        return [len(example.labels) for example in data.examples("train")]
    return _letters(sample, [choice.settings["target_column"]])


def _estimated(sample: Sample, choice: Choice) -> list[int]:
    """Estimate the number of tokens of each row by its letters."""
    kinds = ("text_column", "token_column", "question_column", "source_column")
    names = [choice.settings[kind] for kind in kinds if kind in choice.settings]
    if choice.task == "TokenClassification":
        words = [record.get(*names) if names else record["tokens"] for record in sample.records]
        return [round(len(" ".join(map(str, one or []))) / _CHARACTERS_OF_A_TOKEN) + 2 for one in words]
    if choice.task == "MultipleChoice":
        names = sample.columns  # the longest choice is shorter than all of them together
    return _letters(sample, names or sample.columns)


def _letters(sample: Sample, names: list[str]) -> list[int]:
    texts = [" ".join(str(record.get(name, "")) for name in names) for record in sample.records]
    return [round(len(text) / _CHARACTERS_OF_A_TOKEN) + 2 for text in texts]


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the messages of the data module: the command prints its own, and `fit` repeats them."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
