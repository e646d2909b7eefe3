"""Texts with one label each, several labels, or a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.column_data import ColumnData
from lora_lightning.data.rows.cells import Cell
from lora_lightning.data.rows.pool import fingerprint, kind_of
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.rows.targets import PROBLEMS, check_single_labels, target_of
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.tokenizers import tokenize
from lora_lightning.errors import ConfigError

__all__ = ["TextClassificationData"]


class TextClassificationData(ColumnData):
    """Reads labelled texts for `SequenceClassification`; see `RecordData` for sources and splits.

    Rows without a text or a label are skipped and counted. If each text has one label, duplicates of a text in `train`
    are dropped, and so are all copies of a text with contradictory labels; the splits are stratified by class. If texts
    have several labels or numbers, rows with the same text stay in one split. Sources given for `val` and `test` keep
    their duplicates, so that metrics stay comparable, and a warning reports how many of their texts are in the training
    rows too. A folder with one sub-folder of `.txt` files for each class is also a source; the files may be compressed.

    Batches hold `input_ids` and `attention_mask` `[batch, length]` and `labels`: class indices `[batch]`, 0 and 1 for
    each class `[batch, classes]`, or numbers `[batch]` or `[batch, targets]`.

    Args:
        text_column: Column with the texts.
        label_column: Column with the labels: texts, whole numbers, or true and false; lists of them or separated text
            for several labels; numbers for a regression. A list of columns holds 0 or 1 for each class (the columns
            name the classes), or several numbers. With `label_names`, labels may be numbers of these names, and lists
            may hold 0 or 1 for each.
        problem: `single_label`, `multi_label` or `regression`; None takes that of the task.
        label_separator: What separates several labels in a text; None means `;`, `|` or a comma.
        label_names: Names of the classes by index; None takes the model's, else those found, sorted. After
            `setup`, the attribute of this name holds them.
        **settings: Those of `ColumnData` (`max_length`) and `RecordData`.

    Attributes:
        label_counts: How many training rows have each label.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = TextClassificationData("tweets.csv", where=["confidence >= 0.6"], test_size=2000)
    """

    inputs = ("text_column",)
    targets = ("label_column",)
    label_word = "label"
    needed = "a text and a label"

    def __init__(
        self,
        train: Source | None = None,
        *,
        text_column: str = "text",
        label_column: str | list[str] = "label",
        problem: str | None = None,
        label_separator: str | None = None,
        label_names: list[str | int] | None = None,
        **settings: Any,  # noqa: ANN401 - those of ColumnData
    ) -> None:
        label_columns = [label_column] if isinstance(label_column, str) else label_column
        of_columns = label_columns if len(label_columns) > 1 else []
        super().__init__(train, **settings)
        self._given_names = [str(name) for name in label_names or of_columns]
        if problem is not None and problem not in PROBLEMS:
            raise ConfigError(f"problem is {problem!r}: expected {', '.join(PROBLEMS)}.")
        self.text_column = text_column
        self.label_column = label_columns
        self.label_separator = label_separator
        self.problem = problem
        # A folder of texts gives these names to its columns.
        self._read_files_with(text_column=text_column, label_column=label_columns[0])

    # Rows.

    def needs_training_rows(self) -> bool:
        """Return whether only the training rows say which labels there are; numbers need no names."""
        return self._settled_problem() != "regression" and super().needs_training_rows()

    def _settled_problem(self) -> str:
        return self.problem or getattr(self._module(), "problem", None) or "single_label"

    def _read(self) -> None:
        self.problem = self._settled_problem()
        self.plan = replace(self.plan, stratified=self.problem == "single_label")
        if self.problem == "single_label" and len(self.label_column) > 1:
            raise ConfigError(
                f"label_column names several columns ({', '.join(self.label_column)}), which needs `problem: "
                "multi_label` (columns of 0 and 1) or `problem: regression`. Name one column, or set `problem`."
            )
        if self.problem == "regression":
            self._given_names = self._given_names or ["score"]
        super()._read()

    def reading_key(self) -> list[Any]:
        """Return the settings, and the problem, which may be the task's."""
        return [*super().reading_key(), self.problem]

    def row_of(self, record: Record, split: str) -> Row | None:
        """Return text and target, None where one of them is missing; texts to predict may be empty."""
        text = self._text_to_predict(record, "text_column")
        if kind_of(split) == "predict":
            return Row([text, None], text)
        if not text.strip():
            return None
        cells = [Cell(record.fields.get(column), column, record.place) for column in self.label_column]
        target = target_of(cells, str(self.problem), self.label_separator, self._given_names)
        if target is None:
            return None
        classes: list[Any] = target if isinstance(target, list) else [target]
        return Row([text, target], text, () if self.problem == "regression" else tuple(classes))

    def check_labels(self, labels: Mapping[str, tuple[int, str]], num_rows: int) -> None:
        """Refuse training rows of a single class, and labels that are not classes.

        Raises:
            DataError: They are.
        """
        if self.problem == "multi_label":
            self._tell_alike(labels)
        if self.problem != "single_label":
            return
        super().check_labels(labels, num_rows)
        if not self._given_names:
            counts = {name: count for name, (count, _) in labels.items()}
            check_single_labels(counts, self.plan.source_name("train"), num_rows)

    # Labels and tokens.

    def _settle_labels(self) -> None:
        before = self.label_names
        super()._settle_labels()
        # The fingerprint of rows with classes tells their order too.
        if self.problem != "regression" and self._folder is not None and self.label_names != before:
            self.fingerprint = self._as_drawn(fingerprint(self._folder, self._about.num_rows, self.label_names))

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Tokenize texts."""
        tokens = tokenize(self.tokenizer, [row.content[0] for row in rows], self.max_length)
        for index, pieces in enumerate(tokens):
            target = {} if kind_of(split) == "predict" else {"labels": self._learnt(rows[index].content[1])}
            for piece in self._shortened(pieces, split, counts):
                yield {"row": index, **self._token_columns(piece), **target}

    def _learnt(self, target: Any) -> Any:  # noqa: ANN401 - as it stands in the row
        """Return what is learnt: a class's index, 0 and 1 for each class, or numbers."""
        if self.problem == "single_label":
            return self.label_names.index(target)
        if self.problem == "multi_label":
            return [float(name in target) for name in self.label_names]
        return target

    def _collate(self) -> PadToLongest:
        return replace(self._pad(), side=self.tokenizer.padding_side)
