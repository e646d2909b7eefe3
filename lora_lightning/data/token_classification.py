"""Sentences with one tag for each word, from CoNLL-style files, tables or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.data.batching import EncodedRows, PadToLongest
from lora_lightning.data.packing import UNSUPERVISED
from lora_lightning.data.rows import sorted_labels
from lora_lightning.data.table_data import TableData, TableSplits, usual_sizes
from lora_lightning.data.tables import Table, TableReader
from lora_lightning.data.tagged_sentences import (
    Column,
    TaggedSentence,
    check_tags,
    is_conll,
    read_conll,
    sentences_from,
)
from lora_lightning.data.tokenizers import padding_tokenizer
from lora_lightning.errors import DataError

_TOKENIZED_TOGETHER = 1000
_NOT_A_START = -1


class TokenClassificationData(TableData[TaggedSentence]):
    """Reads tagged sentences, divides them, tokenizes them once, and makes batches for `TokenClassification`.

    A source is a file with one word and its tag a line and an empty line between sentences (`.conll`, `.conllu`,
    `.iob`, `.bio`, `.txt`), a `.jsonl` (`.ndjson`, `.json`), `.parquet`, `.csv` or `.tsv` file with a column of word
    lists and one of tag lists, either of them inside an installed package (`pkg://package/file`), or the name of a Hub
    data set. Copies of a sentence in `train` are dropped, and sentences of the same words stay on one side of a split.

    Batches hold `input_ids` and `attention_mask`, `labels` (the tag's index at the first token of each word, -100
    elsewhere) and `words` (the word's place in its sentence at its first token, -1 elsewhere), `[batch, length]` each,
    padded on the right.

    Args:
        train: Where the training sentences are, and those to split off.
        val: Where the validation sentences are; None splits them off `train`.
        test: Where the test sentences are; None splits them off `train`.
        predict: Where the sentences to predict are (no tags needed); None predicts the test sentences.
        token_column: Column with the words: its number from 0 in a file with one word a line (None means 0), else its
            name (None means `tokens`).
        tag_column: Column with the tags: its number, negative from the end (None means the last), else its name (None
            means `tags`).
        encoding: Encoding of the files.
        subset: Configuration of a Hub data set that has several.
        max_length: Tokens after which a sentence is cut; words beyond are neither learnt nor scored.
        batch_size: Rows in a training batch, on each device.
        eval_batch_size: Rows in any other batch; None means `batch_size`.
        train_size: Number (int) or share (float) of the sentences to train on; None means all that the others leave.
        val_size: Number or share to validate on, where no file is given; None means 0.1, and 0 none.
        test_size: Number or share to test on, where no file is given; None means 0.1, and 0 none.
        group_by_length: Put sentences of like length into a batch, so that little is padded.
        seed: Seed of the split and of the order of training, at least 0.
        num_workers: Processes that make batches; 0 makes them in the main one, which is fast enough for texts.
        tokenizer: Hub name, folder, or `pkg://package/folder` of the tokenizer; None means the backbone's own.

    Attributes:
        rows: The sentences of the splits (`train`, `val`, `test`, `predict`), in the order of their file.
        label_names: Name of each tag by its index: in the order that the model has them, if it has; otherwise sorted.
        counts: See `TableData`; of the sentences encoded also `cut` (at `max_length`) and `words_lost` (beyond it, or
            of no token).
        fingerprint: SHA-256 of the sentences and their splits.
        tokenizer: The tokenizer, once `setup` has run.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = TokenClassificationData("train.conll", val="valid.conll", tag_column=3)
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        token_column: int | str | None = None,
        tag_column: int | str | None = None,
        encoding: str = "utf-8",
        subset: str | None = None,
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
        sources = {"train": train, "val": val, "test": test, "predict": predict}
        super().__init__(
            TableSplits(
                sources=sources,
                sizes=usual_sizes(sources, {"train": train_size, "val": val_size, "test": test_size}),
                seed=seed,
                read_table=self._read_table,
                rows_from=self._sentences_from,
            ),
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
        self.label_names: list[str] = []
        self._columns: tuple[Column | None, Column | None] = (token_column, tag_column)
        self._reader = TableReader(encoding=encoding, subset=subset)
        self._encoded_by: tuple[str, list[str]] | None = None

    def _read_table(self, source: str, role: str) -> Table:
        if is_conll(source):
            return read_conll(source, *self._columns, self._reader.encoding, tagged=role != "predict")
        return self._reader.read(source, role)

    def _sentences_from(self, table: Table, tagged: bool) -> list[TaggedSentence]:
        columns = (None, None) if is_conll(table.source) else self._columns
        return sentences_from(table, *columns, tagged=tagged)

    def _check_rows(self, rows: Mapping[str, list[TaggedSentence]]) -> None:
        """Name the tags, by the model if it knows them, else by the whole training source."""
        of_train = [split for split in ("train", "val", "test") if self._splits.sources[split] is None]
        seen = {tag for split in ("train", *of_train) for row in rows.get(split, ()) for tag in row.tags}
        self.label_names = sorted_labels(seen)
        if len(seen) < 2:
            only = f"only the tag {self.label_names[0]!r}" if seen else "no tags"
            raise DataError(f"{self._splits.sources['train']} has {only}; a tagger needs at least two.")
        self._check_tags(rows, "the training rows do")

    def _check_tags(self, rows: Mapping[str, list[TaggedSentence]], whose: str) -> None:
        for split, sentences in rows.items():
            source = str(self._splits.sources[split] or self._splits.sources["train"])
            check_tags(split, source, sentences, self.label_names, whose)

    def _prepare(self) -> None:
        saved = getattr(self._module(), "label_names", None)
        if saved and list(saved) != self.label_names:
            self.label_names = list(saved)
            self._check_tags(self.rows, "the model does")
        by = (self._name_of_tokenizer(), self.label_names)
        if by != self._encoded_by:
            self.tokenizer = padding_tokenizer(by[0], self.max_length, of_words=True)
            self._encoded_by = by
            self._encoded.clear()

    def _encode(self, split: str) -> EncodedRows:
        """Tokenize sentences, and put each word's tag at its first token."""
        sentences = self.rows[split]
        encodings: dict[str, list[list[int]]] = {}
        for start in range(0, len(sentences), _TOKENIZED_TOGETHER):
            words = [list(sentence.tokens) for sentence in sentences[start : start + _TOKENIZED_TOGETHER]]
            encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
            for name, lists in encoded.items():
                encodings.setdefault(name, []).extend(lists)
            encodings.setdefault("words", []).extend(_starts(encoded.word_ids(row)) for row in range(len(words)))
        self._tell_lost(split, encodings["words"])
        index_of = {name: index for index, name in enumerate(self.label_names)}
        labels = [
            [index_of[sentence.tags[word]] if word != _NOT_A_START else UNSUPERVISED for word in words]
            for sentence, words in zip(sentences, encodings["words"], strict=True)
            if sentence.tags
        ]
        return EncodedRows(encodings, labels or None)

    def _tell_lost(self, split: str, starts: list[list[int]]) -> None:
        """Count the words that have no token, and warn of them."""
        sentences, kept = self.rows[split], [{*words} - {_NOT_A_START} for words in starts]
        empty = next((row for row, words in zip(sentences, kept, strict=True) if not words), None)
        if empty is not None:
            raise DataError(
                f"{empty.place}: no word of the sentence has a token within the first {self.max_length}; set a larger "
                "max_length, or take the sentence out."
            )
        if split == "predict" and self._splits.sources["predict"] is None:
            return  # the test sentences, told of already
        lost = sum(len(row.tokens) - len(words) for row, words in zip(sentences, kept, strict=True))
        cut = sum(len(row.tokens) - 1 not in words for row, words in zip(sentences, kept, strict=True))
        self.counts.update(cut=self.counts.get("cut", 0) + cut, words_lost=self.counts.get("words_lost", 0) + lost)
        if lost:
            rank_zero_warn(
                f"{lost} words of {len(sentences)} {split} sentences of "
                f"{self._splits.sources[split] or self._splits.sources['train']} are neither learnt nor scored: they "
                f"stand beyond the first {self.max_length} tokens, or have none. Set a larger max_length to keep them."
            )

    def _collate(self) -> PadToLongest:
        padding = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "words": _NOT_A_START,
        }
        return PadToLongest(padding)


def _starts(word_ids: list[Any]) -> list[int]:
    """Return the word's place at its first token, -1 elsewhere.

    Example:
        >>> _starts([None, 0, 1, 1, 3, None])
        [-1, 0, 1, -1, 3, -1]
    """
    before = [None, *word_ids]
    return [
        _NOT_A_START if word is None or word == last else word for last, word in zip(before, word_ids, strict=False)
    ]
