"""Texts with one label each, several labels, or a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.record_data import RecordData
from lora_lightning.data.rows.cells import check_known, sorted_labels, text_of
from lora_lightning.data.rows.conditions import is_missing
from lora_lightning.data.rows.pool import fingerprint
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.rows.targets import PROBLEMS, check_single_labels, targets_from
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.tokenizers import Shortener, padding_tokenizer, tell_too_long, tokenize
from lora_lightning.errors import ConfigError, DataError


class TextClassificationData(RecordData):
    """Reads labelled texts for `SequenceClassification`; see `RecordData` for sources and splits.

    Rows without a text or a label are left out and counted. Where each text has one label, further copies of a text in
    `train` are dropped, and every copy of a text that stands there with different labels; each class has its share of
    each split. Where texts have several labels or numbers, rows with the same text stay in one split. Sources given for
    `val` and `test` keep their copies, so that figures stay comparable, and a warning tells how many of their texts
    stand in the training rows as well. A folder with one sub-folder of `.txt` files for each class is a source too.

    Batches hold `input_ids` and `attention_mask` `[batch, length]` and `labels`: class indices `[batch]`, 0 and 1 for
    each class `[batch, classes]`, or numbers `[batch]` or `[batch, targets]`.

    Args:
        train: See `RecordData`.
        text_column: Column with the texts.
        label_column: Column with the labels: texts, whole numbers, or true and false; lists of them or separated text
            for several labels; numbers for a regression. A list of columns holds 0 or 1 for each class (the columns
            name the classes), or several numbers.
        problem: `single_label`, `multi_label` or `regression`; None takes that of the task.
        label_separator: What separates several labels in a text; None means `;`, `|` or a comma.
        label_names: Names of the classes by index; None takes the model's, else those found, sorted.
        max_length: Tokens after which a text is too long.
        **settings: See `RecordData`.

    Attributes:
        label_names: Name of each class by its index.
        label_counts: How many training rows have each label.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = TextClassificationData("tweets.csv", where=["confidence >= 0.6"], test_size=2000)
    """

    needed = "a text and a label"

    def __init__(
        self,
        train: Source,
        *,
        text_column: str = "text",
        label_column: str | list[str] = "label",
        problem: str | None = None,
        label_separator: str | None = None,
        label_names: list[str] | None = None,
        max_length: int = 128,
        **settings: Any,  # noqa: ANN401 - those of RecordData
    ) -> None:
        super().__init__(train, **settings)
        if problem is not None and problem not in PROBLEMS:
            raise ConfigError(f"problem is {problem!r}: expected {', '.join(PROBLEMS)}.")
        self.text_column = text_column
        self.label_columns = [label_column] if isinstance(label_column, str) else list(label_column)
        self.label_separator = label_separator
        self.max_length = max_length
        self.problem = problem
        self._given_names = label_names
        self._require_at_least(max_length=1)
        read = replace(self.plan.settings, text_column=text_column, label_column=self.label_columns[0])
        self.plan = replace(self.plan, settings=read)

    # Rows.

    def _read(self) -> None:
        self.problem = self.problem or getattr(self._module(), "problem", None) or "single_label"
        self.plan = replace(self.plan, stratified=self.problem == "single_label")
        super()._read()

    def reading_key(self) -> list[Any]:
        """Return the settings, and the problem, which may be the task's."""
        return [*super().reading_key(), self.problem]

    def columns_read(self, split: str) -> dict[str, str]:
        """Return the columns of texts and labels; rows to predict need no labels."""
        labels = {} if split == "predict" else dict.fromkeys(self.label_columns, "label_column")
        return {self.text_column: "text_column", **labels}

    def row_of(self, record: Record, split: str) -> Row | None:
        """Return text and target, None where one of them is missing; texts to predict may be empty."""
        cell = record.fields.get(self.text_column)
        if split == "predict":
            text = "" if is_missing(cell) else text_of(cell, record.place, self.text_column)
            return Row([text, None], text)
        if is_missing(cell):
            return None
        text = text_of(cell, record.place, self.text_column)
        problem = self.problem or "single_label"
        columns = self.label_columns[0] if len(self.label_columns) == 1 else self.label_columns
        target = targets_from(record.fields, columns, problem, self.label_separator, record.place)
        if target is None:
            return None
        if problem == "regression":
            return Row([text, target], text)
        labels = [target] if isinstance(target, str) else target
        return Row([text, target], text, tuple(map(str, labels)))  # type: ignore[arg-type]  # no number, of classes

    def check_labels(self, labels: Mapping[str, tuple[int, str]], num_rows: int) -> None:
        """Refuse training rows of a single class, and labels that are no classes.

        Raises:
            DataError: They are.
        """
        source = self.plan.source_name("train")
        if self.problem == "regression":
            return
        if len(labels) < 2 and self.problem == "single_label":
            only = f"only the label {next(iter(labels))!r}" if labels else "no row left"
            raise DataError(
                f"{source} has {only} in the column {self.label_columns[0]!r} (after conditions and duplicates); a "
                "classifier needs at least two."
            )
        if self.problem == "single_label":
            counts = {name: count for name, (count, _) in labels.items()}
            check_single_labels(counts, source, self._given_names is not None, num_rows)

    # Labels and tokens.

    def _settle_labels(self) -> None:
        """Take the model's label names if it has some, else those given, else those of the training source."""
        saved = getattr(self._module(), "label_names", None)
        if self.problem == "regression":
            self.label_names = list(saved or self._given_names or self._target_names())
            return
        found = sorted_labels(self._about.labels.get("train", {}))
        given = self._given_names or (self.label_columns if len(self.label_columns) > 1 else found)
        names = list(saved) if saved else list(given)
        if names == self.label_names:
            return
        whose = "the model does" if saved else "the training rows do"
        for split, labels in self._about.labels.items():
            if split != "predict":
                check_known(labels, names, self.plan.source_name(split), split, whose)
        self.label_names = names
        if self._folder is not None:
            self.fingerprint = self._as_drawn(fingerprint(self._folder, self._about.num_rows, names))

    def _target_names(self) -> list[str]:
        return self.label_columns if len(self.label_columns) > 1 else ["score"]

    def load_tokenizer(self, name: str) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Return a tokenizer that can pad."""
        return padding_tokenizer(name, self.max_length)

    def encoding_key(self) -> list[Any]:
        """Return the length, and what becomes of longer texts."""
        return [self.max_length, self.too_long]

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> dict[str, list[Any]]:
        """Tokenize texts."""
        columns: dict[str, list[Any]] = {"input_ids": [], "row": []}
        tokens = tokenize(self.tokenizer, [row.content[0] for row in rows], self.max_length)
        too_long = "cut" if split == "predict" else self.too_long
        for index, piece in Shortener(too_long, counts).pieces(tokens):
            # Without special tokens an empty text has no tokens at all, and no model takes that.
            columns["input_ids"].append(piece.ids or [self.tokenizer.pad_token_id])
            columns["row"].append(index)
            if "token_type_ids" in self.tokenizer.model_input_names:
                columns.setdefault("token_type_ids", []).append(piece.type_ids or [0])
            if split != "predict":
                columns.setdefault("labels", []).append(self._target(rows[index].content[1]))
        return columns

    def _target(self, target: Any) -> Any:  # noqa: ANN401 - as it stands in the row
        """Return what is learnt: a class's index, 0 and 1 for each class, or numbers."""
        if self.problem == "single_label":
            return self.label_names.index(target)
        if self.problem == "multi_label":
            return [float(name in target) for name in self.label_names]
        return target

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of texts that are too long."""
        whose = f"{split} texts of {self.plan.source_name(split)}"
        tell_too_long(lost, len(self._rows(split)), whose, self.max_length)

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return a text and its label, labels or numbers."""
        text, target = content
        return text, tuple(target) if isinstance(target, list) else target

    def _collate(self) -> PadToLongest:
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return PadToLongest(padding, self.tokenizer.padding_side)
