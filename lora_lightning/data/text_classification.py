"""Texts with one label each, from a table, a folder or the Hub."""

from __future__ import annotations

from collections.abc import Collection

from lora_lightning.data.base import TokenizedData
from lora_lightning.data.batching import EncodedRows, PadToLongest
from lora_lightning.data.conditions import parse_condition
from lora_lightning.data.labelled_splits import LabelledSplits
from lora_lightning.data.rows import Rows, fingerprint, sorted_labels
from lora_lightning.data.tables import TableReader, is_hub_name
from lora_lightning.data.tokenizers import padding_tokenizer

_TOKENIZED_TOGETHER = 1000


class TextClassificationData(TokenizedData):
    """Reads labelled texts, divides them, tokenizes them once, and makes batches of like length.

    A source is a `.csv`, `.tsv`, `.jsonl` (`.ndjson`, `.json`) or `.parquet` file, a folder with one sub-folder of
    `.txt` files for each class, either of them inside an installed package (`pkg://package/folder/file.csv`), or the
    name of a Hub data set. Rows without a text or a label are dropped. In `train`, so are further copies of a text, and
    every copy of a text that stands there with different labels; sources given for `val` and `test` keep their copies,
    so that figures stay comparable, and a warning tells how many of their texts stand in the training rows as well.

    Args:
        train: Where the training rows are, and those to split off.
        val: Where the validation rows are; None splits them off `train`.
        test: Where the test rows are; None splits them off `train`.
        predict: Where the texts to predict are (no labels needed, no row is dropped); None predicts the test rows.
        text_column: Column with the texts.
        label_column: Column with the labels: texts, whole numbers, or true and false.
        encoding: Encoding of the files.
        separator: Separator of a `.csv` or `.tsv` file; None means a comma and a tab.
        subset: Configuration of a Hub data set that has several.
        where: Conditions that every row of `train`, `val` and `test` must meet, such as `confidence >= 0.6` or
            `lang == 'en'`.
        max_length: Tokens after which a text is cut.
        batch_size: Rows in a training batch, on each device.
        eval_batch_size: Rows in any other batch; None means `batch_size`.
        train_size: Number (int) or share (float) of the rows to train on; None means all that the others leave.
        val_size: Number or share of the rows to validate on, where no file is given; None means 0.1, and 0 none.
        test_size: Number or share of the rows to test on, where no file is given; None means 0.1, and 0 none.
        group_by_length: Put texts of like length into a batch, so that little is padded.
        seed: Seed of the split and of the order of training, at least 0.
        num_workers: Processes that make batches; 0 makes them in the main one, which is fast enough for texts.
        tokenizer: Hub name, folder, or `pkg://package/folder` of the tokenizer; None means the backbone's own.

    Attributes:
        rows: Texts and labels of the splits (`train`, `val`, `test`, `predict`), in the order of their file.
        label_names: Name of each class by its index: in the order that the model has them, if it has; otherwise sorted.
        counts: What became of the rows: `rows_read`, `rows_filtered` (by `where`), `rows_incomplete` (no text or
            label), `duplicates_dropped`, `contradictions_dropped`, `train`, `val`, `test`, `unused`, and `leaked` (rows
            of sources for `val` and `test` whose text is in the training rows).
        fingerprint: SHA-256 of the rows, their splits and the label names.
        tokenizer: The tokenizer, once `setup` has run.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = TextClassificationData("tweets.csv", where=["confidence >= 0.6"], test_size=2000)
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        encoding: str = "utf-8",
        separator: str | None = None,
        subset: str | None = None,
        where: list[str] | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        group_by_length: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            group_by_length=group_by_length,
            seed=seed,
            num_workers=num_workers,
            tokenizer=tokenizer,
        )
        self.save_hyperparameters(logger=False)
        self.max_length = max_length
        self._require_at_least(max_length=1)
        self.rows: dict[str, Rows] = {}
        self.label_names: list[str] = []
        self._splits = LabelledSplits(
            sources={"train": train, "val": val, "test": test, "predict": predict},
            sizes={"train": train_size, "val": val_size, "test": test_size},
            reader=TableReader(
                text_column=text_column,
                label_column=label_column,
                encoding=encoding,
                separator=separator,
                subset=subset,
            ),
            conditions=tuple(map(parse_condition, where or [])),
            seed=seed,
        )
        self._encoded_by = ""

    # What Lightning calls.

    def prepare_data(self) -> None:
        """Download Hub data sets, in one process."""
        for role, source in self._splits.sources.items():
            if source is not None and is_hub_name(source):
                self._splits.reader.read(source, role)

    # Labels, tokens and batches.

    @property
    def _splits_read(self) -> Collection[str]:
        return self.rows

    def _read(self) -> None:
        self.rows, self.counts = self._splits.load()

    def _prepare(self) -> None:
        self._name_labels()
        name = self._name_of_tokenizer()
        if name != self._encoded_by:
            self.tokenizer = padding_tokenizer(name, self.max_length)
            self._encoded_by = name
            self._encoded.clear()

    def _name_labels(self) -> None:
        """Take the model's label names if it has some, else those of the training rows."""
        saved = getattr(self._module(), "label_names", None)
        names = list(saved) if saved else sorted_labels(self.rows["train"].labels)
        if names == self.label_names:
            return
        self._splits.check_labels(self.rows, names, "the model does" if saved else "the training rows do")
        self.label_names = names
        self.fingerprint = fingerprint({name: rows for name, rows in self.rows.items() if name != "predict"}, names)
        self._encoded.clear()

    def _encode(self, split: str) -> EncodedRows:
        rows = self.rows[split]
        encodings: dict[str, list[list[int]]] = {}
        # Without special tokens an empty text has no tokens at all, and no model takes that.
        of_nothing = {"input_ids": [self.tokenizer.pad_token_id], "attention_mask": [1]}
        for start in range(0, len(rows), _TOKENIZED_TOGETHER):
            texts = rows.texts[start : start + _TOKENIZED_TOGETHER]
            encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
            for name, lists in encoded.items():
                encodings.setdefault(name, []).extend(tokens or of_nothing.get(name, [0]) for tokens in lists)
        index_of = {name: index for index, name in enumerate(self.label_names)}
        return EncodedRows(encodings, [index_of[label] for label in rows.labels] or None)

    def _collate(self) -> PadToLongest:
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return PadToLongest(padding, self.tokenizer.padding_side)
