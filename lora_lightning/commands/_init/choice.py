"""The choice of task and data module for a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_lightning.commands._init.columns import Column
from lora_lightning.commands._init.sample import Sample
from lora_lightning.data.rows.targets import PROBLEMS
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.paths import some_of
from lora_lightning.wording import suggestion

CLASSIFICATION = "SequenceClassification"
DATA_MODULES = {
    CLASSIFICATION: "TextClassificationData",
    "TokenClassification": "TokenClassificationData",
    "MultipleChoice": "MultipleChoiceData",
    "Seq2SeqLM": "Seq2SeqData",
    "CausalLM": "InstructionData",
}
"""The data module of each task."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The choices of the user.

    Args:
        task: A task; None chooses it by the data.
        problem: A problem of `SequenceClassification`; None chooses it by the data.
        text: The column of the inputs; None chooses it by the data.
        label: The columns of the targets; an empty list chooses them by the data.
        architecture: Kind of backbone, `encoder`, `decoder` or `encoder-decoder`; None if unknown.
    """

    task: str | None = None
    problem: str | None = None
    text: str | None = None
    label: tuple[str, ...] = ()
    architecture: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A task, and what its data module needs to read the data.

    Args:
        task: The task's class.
        settings: Settings of the data module that name columns.
        seen: Reason for it, as part of a sentence.
        problem: The problem of `SequenceClassification`.
        has_turns: Whether the rows are conversations, which a chat template writes out.
    """

    task: str
    seen: str
    settings: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    has_turns: bool = False


Guess = Callable[[Sample, Sequence[Column], Wishes], Choice | None]
"""Looks at the columns of a sample; None if they do not fit its task."""


def wishes_from(
    task: str | None,
    text_column: str | None,
    label_column: str | None,
    columns: Sequence[str],
    architecture: str | None,
) -> Wishes:
    """Return the choices in the options of the command.

    Args:
        task: A task, or a problem of `SequenceClassification`.
        text_column: The column of the inputs.
        label_column: The column of the targets, or several with commas between them.
        columns: The columns that there are.
        architecture: Kind of backbone.

    Raises:
        ConfigError: A task or a column is not there.
    """
    known = {name.lower(): name for name in (*DATA_MODULES, *PROBLEMS)}
    name = None if task is None else known.get(task.lower())
    if task is not None and name is None:
        raise ConfigError(f"--task is {task!r}: {suggestion(task, known.values())}.")
    labels = () if label_column is None else tuple(one.strip() for one in label_column.split(","))
    if label_column in columns:  # a name with a comma in it
        labels = (str(label_column),)
    given = {"--text_column": (text_column,) if text_column else (), "--label_column": labels}
    for option, names in given.items():
        for one in names:
            if one not in columns:
                raise ConfigError(f"{option} is {one!r}, which is not a column: {suggestion(one, columns)}.")
    is_problem = name in PROBLEMS
    return Wishes(
        task=CLASSIFICATION if is_problem else name,
        problem=name if is_problem else None,
        text=text_column,
        label=labels,
        architecture=architecture,
    )


def choose(sample: Sample, columns: Sequence[Column], wishes: Wishes, guesses: Mapping[str, Guess]) -> Choice:
    """Return the first task that fits a sample, or the one that the user chose.

    Args:
        sample: The sample.
        columns: Its columns.
        wishes: The choices of the user.
        guesses: A function for each task that analyses the columns, the most specific first.

    Raises:
        DataError: No task fits, or not the one that the user chose.
    """
    names = some_of([repr(column.name) for column in columns], 20)
    if wishes.task is not None:
        choice = guesses[wishes.task](sample, columns, wishes)
        if choice is None:
            raise DataError(
                f"{sample.source} has no columns for {wishes.task} (columns: {names}). Name them with --text_column "
                "and --label_column, or choose another --task."
            )
        return choice
    for guess in guesses.values():
        choice = guess(sample, columns, wishes)
        if choice is not None:
            return choice
    raise DataError(
        f"{sample.source}: cannot tell what is to be learnt from the columns {names}. Set --task "
        f"({', '.join(DATA_MODULES)}), --text_column and --label_column."
    )


def named(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    """Return the column with the first of some names that exists, ignoring case."""
    by_name = {column.name.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def column_of(columns: Sequence[Column], name: str) -> Column:
    """Return the column of a name.

    Raises:
        DataError: It holds nothing.
    """
    found = next((column for column in columns if column.name == name), None)
    if found is None:
        raise DataError(f"The column {name!r} is empty in every row that was looked at; name another.")
    return found
