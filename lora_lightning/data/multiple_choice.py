"""Questions with several choices, one of which is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.record_data import RecordData
from lora_lightning.data.rows.cells import cell_of, text_of
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.tokenizers import Shortener, padding_tokenizer, tell_too_long, tokenize
from lora_lightning.errors import DataError

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
            choices = _choices_of(item)
            mask[index, : len(choices)] = 1
            # What fills up is a copy of a row's first choice, so that no model meets a text without tokens.
            flat += choices + choices[:1] * (most - len(choices))
        batch = {name: tensor.view(len(items), most, -1) for name, tensor in self.pad(flat).items()}
        batch["choice_mask"] = mask
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([int(item["labels"]) for item in items])
        return batch


class MultipleChoiceData(RecordData):
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
        max_length: Tokens of question and choice after which they are too long; the question is cut.
        batch_size: Questions in a training batch, on each device.
        **settings: See `RecordData`; `too_long` is `cut` or `drop`.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = MultipleChoiceData("questions.jsonl", label_column="answer")
    """

    lengths_allowed = ("cut", "drop")

    def __init__(
        self,
        train: Source,
        *,
        question_column: str = "question",
        choices_column: str = "choices",
        label_column: str = "label",
        max_length: int = 128,
        batch_size: int = 8,
        **settings: Any,  # noqa: ANN401 - those of RecordData
    ) -> None:
        super().__init__(train, batch_size=batch_size, **settings)
        self.question_column, self.choices_column, self.label_column = question_column, choices_column, label_column
        self.max_length = max_length
        self._require_at_least(max_length=4)

    def columns_read(self, split: str) -> dict[str, str]:
        """Return the columns of questions, choices and labels; rows to predict need no labels."""
        columns = {self.question_column: "question_column", self.choices_column: "choices_column"}
        return columns if split == "predict" else {**columns, self.label_column: "label_column"}

    def row_of(self, record: Record, split: str) -> Row:
        """Return question, choices, and the index of the right one, -1 if unknown."""
        text = text_of(cell_of(record, self.question_column, "question_column"), record.place, self.question_column)
        cell = cell_of(record, self.choices_column, "choices_column")
        choices = _choices(cell, record.place, self.choices_column)
        label = _UNKNOWN
        if split != "predict":
            label = _index_of(cell_of(record, self.label_column, "label_column"), choices, record, self.label_column)
        return Row([text, choices, label], " ".join(text.split()).casefold())

    def load_tokenizer(self, name: str) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Return a tokenizer that can pad."""
        return padding_tokenizer(name, self.max_length)

    def encoding_key(self) -> list[Any]:
        """Return the length, and what becomes of longer rows."""
        return [self.max_length, self.too_long]

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> dict[str, list[Any]]:
        """Tokenize each choice with its question; a row's choices lie one behind another, `sizes` tells them apart."""
        columns: dict[str, list[Any]] = {"input_ids": [], "sizes": [], "length": [], "row": []}
        too_long = "cut" if split == "predict" else self.too_long
        for row, stored in enumerate(rows):
            text, choices, label = stored.content
            pairs = [(text, choice) for choice in choices]
            tokens = tokenize(self.tokenizer, pairs, self.max_length, strategy="only_first")
            # A question is cut or dropped as a whole, and counted once.
            is_long = any(len(pieces) > 1 for pieces in tokens)
            firsts = [pieces[0] for pieces in tokens]
            whole = [[firsts[0], firsts[0]]] if is_long else [[firsts[0]]]
            if not list(Shortener(too_long, counts).pieces(whole)):
                continue
            columns["row"].append(row)
            columns["sizes"].append([len(piece.ids) for piece in firsts])
            columns["length"].append(max(columns["sizes"][-1]))
            columns["input_ids"].append([one for piece in firsts for one in piece.ids])
            if firsts[0].type_ids:
                columns.setdefault("token_type_ids", []).append([one for piece in firsts for one in piece.type_ids])
            if split != "predict":
                columns.setdefault("labels", []).append(label)
        return columns

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of questions that are too long."""
        tell_too_long(
            lost, len(self._rows(split)), f"{split} questions of {self.plan.source_name(split)}", self.max_length
        )

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return the question and the right choice."""
        text, choices, label = content
        return text, choices[label] if label != _UNKNOWN else None

    def _collate(self) -> ChoiceBatch:
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return ChoiceBatch(PadToLongest(padding))


def _choices_of(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the columns of each choice of a row."""
    ends = np.cumsum(item["sizes"])[:-1]
    names = [name for name in item if name not in ("sizes", "labels")]
    parts = {name: np.split(np.asarray(item[name]), ends) for name in names}
    return [{name: parts[name][choice] for name in names} for choice in range(len(item["sizes"]))]


def _choices(cell: Any, place: str, column: str) -> list[str]:  # noqa: ANN401 - whatever a record holds
    """Return the choices of a row; data sets on the Hub often keep them as `{"text": [...], "label": [...]}`."""
    if isinstance(cell, dict) and "text" in cell:
        cell = cell["text"]
    if not isinstance(cell, list) or len(cell) < 2:
        raise DataError(
            f"{place}: the column {column!r} holds {str(cell)[:40]!r}; expected a list of at least two choices."
        )
    return [text_of(one, place, column) for one in cell]


def _index_of(label: Any, choices: list[str], record: Record, column: str) -> int:  # noqa: ANN401 - a label as the file has it
    """Return the index of the right choice."""
    is_whole = isinstance(label, float) and label.is_integer()
    text = str(int(label)) if is_whole else str(label).strip()
    found = _UNKNOWN
    if isinstance(label, str) and text in choices:
        found = choices.index(text)
    elif text.isdigit():
        found = int(text)
    elif len(text) == 1:
        found = _LETTERS.find(text.upper())
    if not 0 <= found < len(choices):
        raise DataError(
            f"{record.place}: the column {column!r} holds {label!r}, and there are {len(choices)} choices; expected "
            f"the index of the right one (0 to {len(choices) - 1}), its letter (A to "
            f"{_LETTERS[min(len(choices), 10) - 1]}), or its text."
        )
    return found
