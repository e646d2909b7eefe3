"""Splits, number of epochs and batch size of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.commands._init.backbone import Backbone
from lora_lightning.commands._init.choice import CLASSIFICATION, Choice
from lora_lightning.commands._init.sample import Sample
from lora_lightning.commands._init.trial import LONGEST, Trial, usual_length
from lora_lightning.errors import DataError

_WRITERS = ("CausalLM", "Seq2SeqLM")
_USUAL_CONTEXT = 512
"""Context of an encoder whose config is not on this machine, in tokens."""
_MARGIN = 1.5
"""Factor on a length that is estimated from letters: rare words have more tokens."""
_FEW_ROWS, _MANY_ROWS = 500, 5000
_SHARE = 0.1
_MOST_TO_EVALUATE = 2000
_FEWEST_TO_TEST = 20
_MOST_RARE = 10
_UNEVEN = 4
"""Ratio of the most to the least frequent class from which on classes are weighted."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training.

    Args:
        data: Settings of the data module beside its source and its columns.
        model: Settings of the task beside backbone, method and rates.
        rank: Rank of LoRA.
        optim: Settings of `Optim`.
        accumulate: Batches to an optimizer step.
        epochs: Epochs.
        monitor: The metric that decides which checkpoint is the best, and its mode.
        notes: Decisions whose reasons are not visible in the config.
    """

    data: dict[str, Any]
    model: dict[str, Any]
    rank: int
    optim: dict[str, Any]
    accumulate: int
    epochs: int
    monitor: tuple[str, str]
    notes: tuple[str, ...] = ()


def lengths_for(choice: Choice, trial: Trial, backbone: Backbone) -> dict[str, int]:
    """Return the settings of the maximum length.

    Args:
        choice: The task.
        trial: The trial on the sample, with the length of each row.
        backbone: The backbone, which may take fewer tokens than the rows have.
    """
    usual = LONGEST if choice.task in _WRITERS else _USUAL_CONTEXT
    most = min(backbone.context or usual, LONGEST)
    margin = 1.0 if trial.is_counted else _MARGIN
    # A choice that leaves no room for its question is refused, so that none may be cut.
    rows = [max(trial.lengths)] if choice.task == "MultipleChoice" else trial.lengths
    lengths = {"max_length": usual_length(rows, most, margin)}
    if trial.target_lengths:
        lengths["max_target_length"] = usual_length(trial.target_lengths, most, margin)
    return lengths


def recipe_for(sample: Sample, choice: Choice, trial: Trial, lengths: dict[str, int]) -> Recipe:
    """Return the settings that are usual for data of this size.

    Args:
        sample: The sample.
        choice: The task.
        trial: The trial on the sample.
        lengths: Result of `lengths_for`.

    Raises:
        DataError: There are too few rows to divide.
    """
    divided, notes = _divided(sample, choice, trial)
    num_rows = _rows_to_train(sample, trial)
    batch_size = _batch_size(choice.task, lengths["max_length"], num_rows)
    is_writer = choice.task in _WRITERS
    return Recipe(
        data={**lengths, "batch_size": batch_size, **divided, **({"bad_rows": "skip"} if trial.num_bad else {})},
        model=_model(choice, trial, lengths),
        rank=16 if is_writer or num_rows > _MANY_ROWS else 8,
        optim=_optim(choice.task),
        accumulate=max(16 // batch_size, 1) if choice.task == "CausalLM" and num_rows > _FEW_ROWS else 1,
        epochs=_epochs(num_rows, is_writer=is_writer),
        monitor=_monitor(choice),
        notes=notes,
    )


def _model(choice: Choice, trial: Trial, lengths: dict[str, int]) -> dict[str, Any]:
    model: dict[str, Any] = {}
    if choice.problem not in (None, "single_label"):
        model["problem"] = choice.problem
    if _are_uneven(choice, trial):
        model["class_weights"] = "balanced"
    if choice.task == "Seq2SeqLM":
        model["max_new_tokens"] = lengths["max_target_length"]
    return model


def _rows_to_train(sample: Sample, trial: Trial) -> int:
    share_used = trial.num_used / max(len(sample.records), 1)
    return max(round(sample.num_rows * share_used), 1)


def _batch_size(task: str, length: int, num_rows: int) -> int:
    by_length = {"CausalLM": ((512, 8), (1024, 4)), "MultipleChoice": ((128, 8), (256, 4))}
    steps = by_length.get(task, ((128, 32), (256, 16), (512, 8)))
    size = next((size for most, size in steps if length <= most), 4 if task not in by_length else 2)
    # A few hundred rows in large batches are few steps.
    while size > 4 and size * 8 > num_rows:
        size //= 2
    return size


def _epochs(num_rows: int, *, is_writer: bool) -> int:
    if is_writer:
        return 3 if num_rows < 20_000 else 1
    return next((epochs for most, epochs in ((_FEW_ROWS, 10), (_MANY_ROWS, 5), (50_000, 3)) if num_rows < most), 1)


def _optim(task: str) -> dict[str, Any]:
    if task == "CausalLM":
        return {"lr": 2e-4, "schedule": "cosine", "warmup": 0.03}
    if task == "Seq2SeqLM":
        return {"lr": 1e-3, "schedule": "cosine", "warmup": 0.03}
    return {"lr": 5e-4, "head_lr": 5e-3, "warmup": 0.06}


def _monitor(choice: Choice) -> tuple[str, str]:
    if choice.task in _WRITERS or choice.problem == "regression":
        return "val/loss", "min"
    return ("val/accuracy", "max") if choice.task == "MultipleChoice" else ("val/f1", "max")


def _are_uneven(choice: Choice, trial: Trial) -> bool:
    if choice.problem != "single_label" or not trial.labels:
        return False
    return max(trial.labels.values()) > _UNEVEN * min(trial.labels.values())


# Splits.


def _divided(sample: Sample, choice: Choice, trial: Trial) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the sizes or sources of validation and test rows, and remarks on them."""
    notes: list[str] = []
    settings: dict[str, Any] = dict(sample.others)
    wanted = [split for split in ("val", "test") if split not in sample.others]
    if choice.task == "CausalLM" and "test" in wanted:
        wanted.remove("test")  # their loss on validation rows is what is usually looked at
    labels = dict(trial.labels) if choice.problem == "single_label" and sample.is_whole else {}
    rare = _rare(labels, len(wanted) + 1)
    if rare and "test" in wanted and not _rare(labels, len(wanted)):
        wanted.remove("test")
        notes.append(f"no test rows: the label {min(labels, key=labels.__getitem__)!r} has only {min(labels.values())}")
    elif rare:
        settings["where"] = _without(sample, choice, rare, labels)
        labels = {name: count for name, count in labels.items() if name not in rare}
        notes.append(f"left out: labels with too few rows to divide ({', '.join(map(repr, rare))})")
    num_rows = sum(labels.values()) if labels else trial.num_used
    if "test" in wanted and num_rows < max(_FEWEST_TO_TEST, 4 * len(labels)):
        wanted.remove("test")
        notes.append(f"no test rows: {num_rows} rows are few")
    for split in ("val", "test"):
        if split not in sample.others:
            settings[f"{split}_size"] = _size(_rows_to_train(sample, trial), len(labels)) if split in wanted else 0
    return settings, tuple(notes)


def _size(num_rows: int, num_labels: int) -> float | int:
    if num_rows * _SHARE > _MOST_TO_EVALUATE:
        return max(_MOST_TO_EVALUATE, num_labels)
    return _SHARE if num_rows * _SHARE >= max(num_labels, 1) else max(num_labels, 1)


def _rare(labels: Mapping[str, int], least: int) -> list[str]:
    return [name for name, count in labels.items() if count < least]


def _without(sample: Sample, choice: Choice, rare: list[str], labels: Mapping[str, int]) -> list[str]:
    """Return conditions that exclude some labels."""
    column = choice.settings.get("label_column")
    if choice.task != CLASSIFICATION or len(rare) > _MOST_RARE or len(labels) - len(rare) < 2:
        raise DataError(
            f"{sample.source}: {len(rare)} of {len(labels)} labels in {column!r} have too few rows to "
            "divide. Name the column of the labels with --label_column, or add rows."
        )
    quoted = [f'"{name}"' if "'" in name else f"'{name}'" for name in rare]
    return [f"`{column}` != {name}" for name in quoted]
