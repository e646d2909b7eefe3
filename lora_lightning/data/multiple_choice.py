"""Questions with several answers, one of which is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lightning.data.batching import EncodedRows, PadToLongest
from lora_lightning.data.rows import text_of
from lora_lightning.data.table_data import TableData, TableSplits, usual_sizes
from lora_lightning.data.tables import Table, TableReader
from lora_lightning.data.tokenizers import padding_tokenizer
from lora_lightning.errors import DataError

_NO_LABEL = -1
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """A question and its choices.

    Args:
        text: The question.
        choices: The answers to choose among, at least two.
        label: The place of the right one, -1 where nobody knows.
    """

    text: str
    choices: tuple[str, ...]
    label: int = _NO_LABEL

    @property
    def group(self) -> str:
        """The question, which stays on one side of a split."""
        return " ".join(self.text.split()).casefold()

    @property
    def content(self) -> list[Any]:
        """All that the question says."""
        return [self.text, self.choices, self.label]


@dataclass(frozen=True)
class ChoiceBatch:
    """Makes a batch of questions, padded to the longest choice and the most choices.

    Args:
        pad: Pads the tokens of choices.
    """

    pad: PadToLongest

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tokens `[batch, choices, length]`, `choice_mask` `[batch, choices]` and `labels` `[batch]`."""
        most = max(len(item["input_ids"]) for item in items)
        names = [name for name in items[0] if name != "labels"]
        # What fills up is a copy of a row's first choice, so that no model meets a text without tokens.
        places = [list(range(len(item["input_ids"]))) for item in items]
        filled = [those + [0] * (most - len(those)) for those in places]
        flat = [
            {name: item[name][place] for name in names}
            for item, those in zip(items, filled, strict=True)
            for place in those
        ]
        batch = {name: tensor.view(len(items), most, -1) for name, tensor in self.pad(flat).items()}
        batch["choice_mask"] = torch.tensor([[int(place < len(those)) for place in range(most)] for those in places])
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([item["labels"] for item in items])
        return batch


class MultipleChoiceData(TableData[Question]):
    """Reads questions with choices, divides them, tokenizes them once, and makes batches for `MultipleChoice`.

    A source is a `.jsonl` (`.ndjson`, `.json`) or `.parquet` file, either inside an installed package
    (`pkg://package/file`), or the name of a Hub data set. The choices of a row are a list of texts; the label is the
    place of the right one from 0, a letter (`A` is the first), or the text of the right one. Copies of a row in `train`
    are dropped, and rows with the same question stay on one side of a split.

    Batches: see `ChoiceBatch`. Each choice is encoded as a pair with its question, padded on the right.

    Args:
        train: Where the training rows are, and those to split off.
        val: Where the validation rows are; None splits them off `train`.
        test: Where the test rows are; None splits them off `train`.
        predict: Where the questions to answer are (no labels needed); None answers the test rows.
        question_column: Column with the questions.
        choices_column: Column with the lists of choices.
        label_column: Column with the labels.
        encoding: Encoding of the files.
        subset: Configuration of a Hub data set that has several.
        max_length: Tokens after which a question is cut; its choice stays whole.
        batch_size: Questions in a training batch, on each device.
        eval_batch_size: Questions in any other batch; None means `batch_size`.
        train_size: Number (int) or share (float) of the rows to train on; None means all that the others leave.
        val_size: Number or share to validate on, where no file is given; None means 0.1, and 0 none.
        test_size: Number or share to test on, where no file is given; None means 0.1, and 0 none.
        group_by_length: Put questions of like length into a batch, so that little is padded.
        seed: Seed of the split and of the order of training, at least 0.
        num_workers: Processes that make batches; 0 makes them in the main one, which is fast enough for texts.
        tokenizer: Hub name, folder, or `pkg://package/folder` of the tokenizer; None means the backbone's own.

    Attributes:
        rows: The questions of the splits (`train`, `val`, `test`, `predict`), in the order of their file.
        counts: See `TableData`.
        fingerprint: SHA-256 of the questions and their splits.
        tokenizer: The tokenizer, once `setup` has run.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = MultipleChoiceData("questions.jsonl", label_column="answer")
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        question_column: str = "question",
        choices_column: str = "choices",
        label_column: str = "label",
        encoding: str = "utf-8",
        subset: str | None = None,
        max_length: int = 128,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        group_by_length: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        sources = {"train": train, "val": val, "test": test, "predict": predict}
        super().__init__(
            TableSplits(
                sources=sources,
                sizes=usual_sizes(sources, {"train": train_size, "val": val_size, "test": test_size}),
                seed=seed,
                read_table=TableReader(encoding=encoding, subset=subset).read,
                rows_from=self._questions_from,
            ),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            group_by_length=group_by_length,
            seed=seed,
            num_workers=num_workers,
            tokenizer=tokenizer,
        )
        self.save_hyperparameters(logger=False)
        self.question_column, self.choices_column, self.label_column = question_column, choices_column, label_column
        self.max_length = max_length
        self._require_at_least(max_length=4)
        self._encoded_by = ""

    def _questions_from(self, table: Table, with_label: bool) -> list[Question]:
        texts = table.column(self.question_column, "question_column").tolist()
        choices = table.column(self.choices_column, "choices_column").tolist()
        labels = table.column(self.label_column, "label_column").tolist() if with_label else [None] * len(texts)
        found = []
        for index, text, answers, label in zip(table.frame.index.tolist(), texts, choices, labels, strict=True):
            place = f"{table.source}, row {index + 1}"
            kept = _choices(answers, place, self.choices_column)
            where = _place_of(label, kept, place, self.label_column) if with_label else _NO_LABEL
            found.append(Question(text_of(text, place, self.question_column), kept, where))
        return found

    def _prepare(self) -> None:
        name = self._name_of_tokenizer()
        if name != self._encoded_by:
            self.tokenizer = padding_tokenizer(name, self.max_length)
            self._encoded_by = name
            self._encoded.clear()

    def _encode(self, split: str) -> EncodedRows:
        """Tokenize each choice with its question."""
        encodings: dict[str, list[Any]] = {}
        for row in self.rows[split]:
            encoded = self.tokenizer(
                [row.text] * len(row.choices), list(row.choices), truncation="only_first", max_length=self.max_length
            )
            for name, lists in encoded.items():
                encodings.setdefault(name, []).append(lists)
        rows = EncodedRows(encodings, None if split == "predict" else [row.label for row in self.rows[split]])
        rows.lengths = [max(map(len, choices)) for choices in encodings["input_ids"]]
        return rows

    def _collate(self) -> ChoiceBatch:
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return ChoiceBatch(PadToLongest(padding))


def _choices(cell: Any, place: str, column: str) -> tuple[str, ...]:  # noqa: ANN401 - whatever a table holds
    """Return the choices of a row; data sets on the Hub often keep them as `{"text": [...], "label": [...]}`."""
    if isinstance(cell, dict) and "text" in cell:
        cell = cell["text"]
    if hasattr(cell, "tolist"):  # an array, as Parquet gives it
        cell = cell.tolist()
    if not isinstance(cell, list | tuple) or len(cell) < 2:
        raise DataError(
            f"{place}: the column {column!r} holds {str(cell)[:40]!r}; expected a list of at least two choices."
        )
    return tuple(text_of(one, place, column) for one in cell)


def _place_of(label: Any, choices: tuple[str, ...], place: str, column: str) -> int:  # noqa: ANN401 - a label as the file has it
    """Return the place of the right choice."""
    text = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()
    found = _NO_LABEL
    if isinstance(label, str) and text in choices:
        found = choices.index(text)
    elif text.isdigit():
        found = int(text)
    elif len(text) == 1:
        found = _LETTERS.find(text.upper())
    if not 0 <= found < len(choices):
        raise DataError(
            f"{place}: the column {column!r} holds {label!r}, and there are {len(choices)} choices; expected the place "
            f"of the right one (0 to {len(choices) - 1}), its letter (A to {_LETTERS[min(len(choices), 10) - 1]}), or "
            "its text."
        )
    return found
