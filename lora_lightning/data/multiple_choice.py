"""Questions with several choices, one of which is right."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.column_data import ColumnData, joined, parts_of
from lora_lightning.data.notices import warn
from lora_lightning.data.rows.cells import Cell, cell_of, is_bracketed, parsed_list, text_of
from lora_lightning.data.rows.inputs import InputRow
from lora_lightning.data.rows.pool import kind_of
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.tokenizers import tokenize
from lora_lightning.errors import DataError

__all__ = ["MultipleChoiceData"]

_UNKNOWN = -1
_ENOUGH_TO_TELL = 30
"""Number of rows from which on it is unlikely by chance that the first choice is never right."""


@dataclass(frozen=True)
class ChoiceBatch:
    """Makes a batch of questions, padded to the longest choice and the most choices.

    Args:
        pad: Pads the tokens of choices.
    """

    pad: PadToLongest

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tokens `[batch, choices, length]`, `choice_mask` `[batch, choices]` and `labels` `[batch]`."""
        most = max(len(item["sizes"]) for item in items)
        flat: list[dict[str, Any]] = []
        mask = torch.zeros(len(items), most, dtype=torch.long)
        for index, item in enumerate(items):
            choices = parts_of(item)
            mask[index, : len(choices)] = 1
            # Padding choices are copies of the first choice of the row, since models fail on a text without tokens.
            flat += choices + choices[:1] * (most - len(choices))
        batch = {name: tensor.view(len(items), most, -1) for name, tensor in self.pad(flat).items()}
        batch["choice_mask"] = mask
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([int(item["labels"]) for item in items])
        return batch


class MultipleChoiceData(ColumnData):
    """Reads questions with choices for `MultipleChoice`; see `RecordData` for sources and splits.

    The choices of a row are a list of texts; the label is the index of the right one from 0, a letter (`A` is the
    first), or the text of the right one. Where a row names its choices itself, as in `{"text": ["yes", "no"], "label":
    ["1", "2"]}` or by their columns, a label is such a name first. Copies of a row in `train` are dropped, and rows
    with the same question stay in one split.

    Batches: see `ChoiceBatch`. Each choice is encoded as a pair with its question, padded on the right.

    Args:
        question_column: Column with the questions.
        choices_column: Column with the lists of choices; or a list of columns, one for each choice.
        label_column: Column with the labels.
        batch_size: Questions in a training batch, on each device.
        **settings: Those of `ColumnData` (`max_length` counts question and choice; the question is cut) and
            `RecordData`; `too_long` is `cut` or `drop`.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = MultipleChoiceData("questions.jsonl", label_column="answer")
    """

    inputs = ("question_column", "choices_column")
    targets = ("label_column",)
    row_word = "question"
    lengths_allowed = ("cut", "drop")
    min_length = 4

    def __init__(
        self,
        train: Source | None = None,
        *,
        question_column: str = "question",
        choices_column: str | list[str] = "choices",
        label_column: str = "label",
        batch_size: int = 8,
        **settings: Any,  # noqa: ANN401 - those of ColumnData
    ) -> None:
        super().__init__(train, batch_size=batch_size, **settings)
        self.question_column = question_column
        self.choices_column = choices_column
        self.label_column = label_column
        self._numbers: Counter[int] = Counter()

    def row_of(self, record: Record, split: str) -> Row:
        """Return question, choices, and the index of the right one, -1 if unknown."""
        text = text_of(self._cell(record, "question_column"))
        columns = self._columns_of("choices_column")
        choices, names = _choices_of([cell_of(record, column, "choices_column") for column in columns])
        label = _UNKNOWN
        if kind_of(split) != "predict":
            cell = self._cell(record, "label_column")
            label = _index_of(cell, choices, names)
            if str(cell.value) == str(label):
                self._numbers[label] += 1
        return Row([text, choices, label], " ".join(text.split()).casefold())

    def check_labels(self, labels: Mapping[str, tuple[int, str]], num_rows: int) -> None:
        """Warn of numbers that probably count from 1."""
        if self._numbers.total() >= _ENOUGH_TO_TELL and not self._numbers[0]:
            warn(
                f"{self.plan.source_name('train')}: the label is never 0 in {self._numbers.total()} rows, so that the "
                "first choice is never right. If labels count from 1, subtract 1 from them."
            )

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Tokenize each choice with its question, into one row with the tokens of all."""
        for index, row in enumerate(rows):
            text, choices, label = row.content
            if not self._has_room(row, counts, split):
                continue
            pairs = [(text, choice) for choice in choices]
            tokens = tokenize(self.tokenizer, pairs, self.max_length, strategy="only_first")
            # The first pieces of all choices, and further ones if a choice is too long.
            pieces = list(itertools.zip_longest(*tokens))
            target = {} if kind_of(split) == "predict" else {"labels": label}
            for firsts in self._shortened(pieces, split, counts):
                yield {"row": index, **joined(list(map(self._token_columns, firsts))), **target}

    def _has_room(self, row: StoredRow, counts: Counter[str], split: str) -> bool:
        """Return whether each choice leaves room for at least a token of its question; count a row that is dropped.

        Raises:
            DataError: One does not, and rows that are too long are cut, or are to be predicted.
        """
        _, choices, _ = row.content
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        # A token has at least a byte, so that most choices need not be tokenized.
        long = [choice for choice in choices if len(choice.encode()) >= room]
        most = max((len(self.tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in long), default=0)
        if most < room:
            return True
        if self.too_long == "drop" and kind_of(split) != "predict":
            counts["dropped"] += 1
            return False
        raise DataError(
            f"{row.place}: a choice has {most} tokens, which leaves no room for its question within {self.max_length}. "
            "Set a larger max_length, or too_long to drop."
        )

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return the question and the right choice."""
        text, choices, label = content
        return text, choices[label] if label != _UNKNOWN else None

    def complete_prediction(self, row: InputRow, prediction: Any) -> Any:  # noqa: ANN401 - the task's own type
        """Return the prediction with the text of the chosen answer."""
        if not isinstance(prediction, Mapping) or "choice" not in prediction:
            return prediction
        return {**prediction, "answer": row.content[1][prediction["choice"]]}

    def _collate(self) -> ChoiceBatch:
        return ChoiceBatch(self._pad())


def _choices_of(cells: list[Cell]) -> tuple[list[str], list[str]]:
    """Return the choices of a row, and the names that the row itself gives them; no names where it does not."""
    if len(cells) > 1:
        given = _without_empty_end(cells)
        if len(given) < 2:
            raise cells[0].refuse("expected a choice in at least two of the columns.")
        return list(map(text_of, given)), [cell.column for cell in given]
    cell, names = cells[0], []
    if isinstance(cell.value, dict) and "text" in cell.value:  # as data sets on the Hub often keep them
        names = list(map(str, cell.value.get("label") or []))
        cell = cell._replace(value=cell.value["text"])
    if isinstance(cell.value, str) and is_bracketed(cell.value.strip()):
        cell = cell._replace(value=parsed_list(cell.value.strip()))
    if not isinstance(cell.value, list) or len(cell.value) < 2:
        raise cells[0].refuse('expected a list of at least two choices, such as ["a", "b"].')
    if names and len(names) != len(cell.value):
        raise cells[0].refuse(f"{len(cell.value)} choices have {len(names)} labels; each needs one.")
    return list(map(text_of, cell.entries())), names


def _without_empty_end(cells: list[Cell]) -> list[Cell]:
    """Return the cells up to the last that is filled: a question with fewer choices leaves the last columns empty."""
    filled = [index for index, cell in enumerate(cells) if not cell.is_missing]
    return cells[: max(filled, default=-1) + 1]


def _index_of(cell: Cell, choices: list[str], names: list[str]) -> int:
    """Return the index of the right choice."""
    label, last = cell.value, len(choices) - 1
    indices = range(len(choices))
    answers = {str(index): index for index in indices}
    for letters in (string.ascii_uppercase, string.ascii_lowercase):
        answers |= dict(zip(letters, indices, strict=False))
    if isinstance(label, str):
        # A text goes before letters and numbers; of equal ones, the first is taken.
        answers |= {choices[index]: index for index in reversed(indices)}
    answers |= dict(zip(names, indices, strict=True)) if names else {}
    is_whole = isinstance(label, float) and label.is_integer()
    answer = str(int(label)) if is_whole else str(label).strip()
    if answer not in answers:
        beyond = " If the labels count from 1, subtract 1 from all." if answer == str(len(choices)) else ""
        raise cell.refuse(
            f"there are {len(choices)} choices; expected the index of the right one (0 to {last}), its letter (A to "
            f"{string.ascii_uppercase[min(last, 25)]}), or its text.{beyond}"
        )
    return answers[answer]
