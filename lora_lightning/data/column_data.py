"""Data modules that read named columns and tokenize them up to a maximum length."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.notices import warn
from lora_lightning.data.record_data import RecordData
from lora_lightning.data.rows.cells import Cell, cell_of, check_known, sorted_labels, text_of
from lora_lightning.data.rows.pool import kind_of
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.tokenizers import Tokens, padding_tokenizer, tell_too_long
from lora_lightning.errors import DataError

_Piece = TypeVar("_Piece")
_COUNTED_AS = {"cut": "cut", "drop": "dropped", "split": "split"}


class ColumnData(RecordData):
    """Reads rows from the columns that settings name; see `RecordData` for sources and splits.

    A subclass declares the class attributes below and defines `row_of` and `encode`.

    Args:
        max_length: Tokens after which a row is too long.
        **settings: Those of `RecordData`.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.
    """

    inputs: ClassVar[tuple[str, ...]] = ()
    """The settings that name columns of every row."""
    targets: ClassVar[tuple[str, ...]] = ()
    """The settings that name columns of targets; rows to predict need not have them."""
    row_word: ClassVar[str] = "text"
    """What a row is called, for messages."""
    label_word: ClassVar[str] = ""
    """What a label is called, for messages; empty where rows have none."""
    min_length: ClassVar[int] = 1
    padding: ClassVar[Mapping[str, int]] = {}
    """What columns beside those of the tokenizer are padded with."""
    of_words: ClassVar[bool] = False
    """Whether the tokenizer is given lists of words."""
    joins_pieces: ClassVar[bool] = False
    """Whether rows to predict may be split because their predictions are joined again."""

    def __init__(
        self,
        train: Source | None = None,
        *,
        max_length: int = 128,
        **settings: Any,  # noqa: ANN401 - those of RecordData
    ) -> None:
        super().__init__(train, **settings)
        self.max_length = max_length
        self._given_names: list[str] = []
        self._require_at_least(max_length=self.min_length)

    # Columns.

    def columns_read(self, split: str) -> dict[str, str]:
        """Return the columns that the settings name; rows to predict need no targets."""
        settings = self.inputs if kind_of(split) == "predict" else (*self.inputs, *self.targets)
        return {column: setting for setting in settings for column in self._columns_of(setting)}

    def _columns_of(self, setting: str) -> list[str]:
        named = getattr(self, setting)
        return [named] if isinstance(named, str) else named

    def needs_training_rows(self) -> bool:
        """Return whether only the training rows say which labels there are."""
        return bool(self.label_word) and not (self._known_labels() or self._given_names)

    def _cell(self, record: Record, setting: str) -> Cell:
        """Return a cell that the record must have."""
        return cell_of(record, getattr(self, setting), setting)

    def _text_to_predict(self, record: Record, setting: str) -> str:
        """Return a text, empty if it is missing: each row to predict gets an answer."""
        column = getattr(self, setting)
        cell = Cell(record.fields.get(column), column, record.place)
        return "" if cell.is_missing else text_of(cell)

    def _read_files_with(self, **settings: Any) -> None:  # noqa: ANN401 - those of ReadSettings
        self.plan = replace(self.plan, settings=replace(self.plan.settings, **settings))

    # Labels.

    def check_labels(self, labels: Mapping[str, tuple[int, str]], num_rows: int) -> None:
        """Refuse training rows of a single label.

        Raises:
            DataError: They have less than two.
        """
        self._tell_alike(labels)
        if self.label_word and len(labels) < 2:
            only = f"only the {self.label_word} {next(iter(labels))!r}" if labels else "no row left"
            raise DataError(
                f"{self.plan.source_name('train')} has {only} (after conditions and duplicates); expected two or more. "
                f"Check {self.label_word}_column."
            )

    def _tell_alike(self, labels: Collection[str]) -> None:
        """Warn of labels that differ in the case of their letters only."""
        by_letters: dict[str, list[str]] = {}
        for name in labels:
            by_letters.setdefault(name.casefold(), []).append(name)
        alike = next((names for names in by_letters.values() if len(names) > 1), None)
        if alike:
            warn(
                f"{self.plan.source_name('train')}: the {self.label_word}s {' and '.join(map(repr, alike))} differ in "
                "the case of their letters only, and each is learnt as a class of its own. Write them alike if they "
                "are the same."
            )

    def _settle_labels(self) -> None:
        """Take the model's names of labels if it has some, else those given, else those of the training source."""
        saved = self._known_labels()
        found = sorted_labels(self._about.labels.get("train", {}))
        names = [*saved] or self._given_names or found
        given = f"{self.label_word}_names does" if self._given_names else "the training rows do"
        owner = "the model does" if saved else given
        for split, labels in self._about.labels.items():
            check_known(labels, names, self.plan.source_name(split), split, owner, f"{self.label_word}s")
        self.label_names = names

    # Tokens.

    def load_tokenizer(self, name: str) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Return a tokenizer that can pad."""
        return padding_tokenizer(name, self.max_length, of_words=self.of_words)

    def encoding_key(self) -> list[Any]:
        """Return the maximum length and the treatment of longer rows; other settings are part of the reading key."""
        return [self.max_length, self.too_long]

    def _shortened(self, pieces: Sequence[_Piece], split: str, counts: Counter[str]) -> Sequence[_Piece]:
        """Return the pieces to keep of a row that was too long, and count the row as cut, dropped or split.

        Rows to predict are never dropped.
        """
        if len(pieces) == 1:
            return pieces
        can_follow = kind_of(split) != "predict" or (self.too_long == "split" and self.joins_pieces)
        way = self.too_long if can_follow else "cut"
        counts[_COUNTED_AS[way]] += 1
        return {"cut": pieces[:1], "drop": [], "split": pieces}[way]

    def _token_columns(self, piece: Tokens) -> dict[str, list[int]]:
        # Without special tokens an empty text has no tokens at all, and no model takes that.
        columns = {"input_ids": piece.ids or [self.tokenizer.pad_token_id]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            columns["token_type_ids"] = piece.type_ids or [0] * len(columns["input_ids"])
        return columns

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of rows that are too long."""
        whose = f"{split} {self.row_word}s of {self.plan.source_name(split)}"
        tell_too_long(lost, len(self._rows(split)), whose, self.max_length)

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return the text and the target of a row whose content is these two."""
        text, target = content
        return text, tuple(target) if isinstance(target, list) else target

    def _collate(self) -> Callable[[Any], dict[str, Tensor]]:
        return self._pad()

    def _pad(self) -> PadToLongest:
        """Return what pads rows on the right."""
        tokens = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return PadToLongest({**tokens, **self.padding})


# Rows of several parts, such as the choices of a question.


def joined(parts: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
    """Return parts as one row: their tokens concatenated, and their numbers of tokens as `sizes`.

    Example:
        >>> joined([{"input_ids": [5, 6]}, {"input_ids": [7]}])
        {'input_ids': [5, 6, 7], 'sizes': [2, 1], 'length': 2}
    """
    sizes = [len(part["input_ids"]) for part in parts]
    columns = {name: list(itertools.chain.from_iterable(part[name] for part in parts)) for name in parts[0]}
    return {**columns, "sizes": sizes, "length": max(sizes)}


def parts_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a row that `joined` made, without a label of the whole row."""
    ends = np.cumsum(row["sizes"])[:-1]
    names = [name for name in row if name not in ("sizes", "labels")]
    columns = [np.split(np.asarray(row[name]), ends) for name in names]
    return [dict(zip(names, part, strict=True)) for part in zip(*columns, strict=True)]
