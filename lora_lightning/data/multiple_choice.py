"""Questions with several choices, one of which is right."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.column_data import ColumnData, joined, parts_of
from lora_lightning.data.rows.cells import Cell, text_of
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.tokenizers import tokenize

_UNKNOWN = -1
_LETTERS = "ABCDEFGHIJ"


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
            # What fills up is a copy of a row's first choice, so that no model meets a text without tokens.
            flat += choices + choices[:1] * (most - len(choices))
        batch = {name: tensor.view(len(items), most, -1) for name, tensor in self.pad(flat).items()}
        batch["choice_mask"] = mask
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([int(item["labels"]) for item in items])
        return batch


class MultipleChoiceData(ColumnData):
    """Reads questions with choices for `MultipleChoice`; see `RecordData` for sources and splits.

    The choices of a row are a list of texts; the label is the index of the right one from 0, a letter (`A` is the
    first), or the text of the right one. Copies of a row in `train` are dropped, and rows with the same question stay
    in one split.

    Batches: see `ChoiceBatch`. Each choice is encoded as a pair with its question, padded on the right.

    Args:
        train: See `RecordData`.
        question_column: Column with the questions.
        choices_column: Column with the lists of choices.
        label_column: Column with the labels.
        batch_size: Questions in a training batch, on each device.
        **settings: See `ColumnData` (`max_length` counts question and choice; the question is cut) and `RecordData`;
            `too_long` is `cut` or `drop`.

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
        train: Source,
        *,
        question_column: str = "question",
        choices_column: str = "choices",
        label_column: str = "label",
        batch_size: int = 8,
        **settings: Any,  # noqa: ANN401 - those of ColumnData
    ) -> None:
        super().__init__(train, batch_size=batch_size, **settings)
        self.question_column = question_column
        self.choices_column = choices_column
        self.label_column = label_column

    def row_of(self, record: Record, split: str) -> Row:
        """Return question, choices, and the index of the right one, -1 if unknown."""
        text = text_of(self._cell(record, "question_column"))
        choices = _choices_of(self._cell(record, "choices_column"))
        label = _UNKNOWN
        if split != "predict":
            label = _index_of(self._cell(record, "label_column"), choices)
        return Row([text, choices, label], " ".join(text.split()).casefold())

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Tokenize each choice with its question, into one row with the tokens of all."""
        for index, row in enumerate(rows):
            text, choices, label = row.content
            pairs = [(text, choice) for choice in choices]
            tokens = tokenize(self.tokenizer, pairs, self.max_length, strategy="only_first")
            # The first pieces of all choices, and further ones if a choice is too long.
            pieces = list(itertools.zip_longest(*tokens))
            target = {} if split == "predict" else {"labels": label}
            for firsts in self._shortened(pieces, split, counts):
                yield {"row": index, **joined(list(map(self._token_columns, firsts))), **target}

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return the question and the right choice."""
        text, choices, label = content
        return text, choices[label] if label != _UNKNOWN else None

    def _collate(self) -> ChoiceBatch:
        return ChoiceBatch(self._pad())


def _choices_of(cell: Cell) -> list[str]:
    """Return the choices of a row; data sets on the Hub often keep them as `{"text": [...], "label": [...]}`."""
    if isinstance(cell.value, dict) and "text" in cell.value:
        cell = cell._replace(value=cell.value["text"])
    if not isinstance(cell.value, list) or len(cell.value) < 2:
        raise cell.refuse("expected a list of at least two choices.")
    return list(map(text_of, cell.entries()))


def _index_of(cell: Cell, choices: list[str]) -> int:
    """Return the index of the right choice."""
    label, last = cell.value, len(choices) - 1
    indices = range(len(choices))
    answers = {str(index): index for index in indices}
    for letters in (_LETTERS, _LETTERS.lower()):
        answers |= dict(zip(letters, indices, strict=False))
    if isinstance(label, str):
        # A text goes before letters and numbers; of equal ones, the first is taken.
        answers |= {choices[index]: index for index in reversed(indices)}
    is_whole = isinstance(label, float) and label.is_integer()
    answer = str(int(label)) if is_whole else str(label).strip()
    if answer not in answers:
        raise cell.refuse(
            f"there are {len(choices)} choices; expected the index of the right one (0 to {last}), its letter (A to "
            f"{_LETTERS[min(last, len(_LETTERS) - 1)]}), or its text."
        )
    return answers[answer]
