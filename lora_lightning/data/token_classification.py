"""Sentences with one tag for each word."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.batches.packing import UNSUPERVISED
from lora_lightning.data.column_data import ColumnData, joined, parts_of
from lora_lightning.data.notices import warn
from lora_lightning.data.rows.cells import Cell, cell_of, is_bracketed, is_integer, name_by_number, parsed_list, text_of
from lora_lightning.data.rows.inputs import InputRow
from lora_lightning.data.rows.pool import kind_of
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.sources.files import CONLL
from lora_lightning.data.sources.text import kind_of_file
from lora_lightning.data.tokenizers import Tokens, tokenize
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.paths import some_of

__all__ = ["TokenClassificationData"]

_NOT_A_START = -1
_USUAL_COLUMNS = {"token_column": "tokens", "tag_column": "tags"}
_LISTED_WORDS = re.compile(r"\[\s*['\"]")
_INSIDE = ("I-", "E-", "L-")
"""Prefixes of tags that continue an entity."""


@dataclass(frozen=True)
class SentenceBatch:
    """Makes a batch of sentences, each in one row; rows to predict may be split into several.

    Args:
        pad: Pads rows.
    """

    pad: PadToLongest

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the rows' tensors; of sentences in several rows also `sentences`, each row's sentence `[rows]`."""
        if "sizes" not in items[0]:
            return self.pad(items)
        parts = [parts_of(item) for item in items]
        batch = self.pad(list(itertools.chain.from_iterable(parts)))
        batch["sentences"] = torch.tensor([index for index, rows in enumerate(parts) for _ in rows])
        return batch


class TokenClassificationData(ColumnData):
    """Reads tagged sentences for `TokenClassification`; see `RecordData` for sources and splits.

    A source has a column of word lists and one of tag lists, or is a file with one word and its tag a line and an empty
    line between sentences (`.conll`, `.conllu`, `.iob`, `.iob2`, `.bio`, `.txt`), or a folder of such files. Copies of
    a sentence in `train` are dropped, and sentences of the same words stay in one split.

    Batches hold `input_ids` and `attention_mask`, `labels` (the tag's index at the first token of each word, -100
    elsewhere) and `words` (the word's index in its sentence at its first token, -1 elsewhere), `[batch, length]` each,
    padded on the right. With `too_long: split`, sentences are split between words, and not inside an entity if its rows
    can hold it. Then batches to predict hold all rows of a sentence, and `sentences` tells which rows belong together.

    Args:
        token_column: Column with the words: its number from 0 in a file with one word a line (None means 0), else its
            name (None means `tokens`).
        tag_column: Column with the tags: its number, negative from the end (None means the last), else its name (None
            means `tags`).
        tag_names: Names of the tags by their number, where the source has numbers.
        **settings: Those of `ColumnData` (words beyond `max_length` are neither learnt nor scored) and `RecordData`.

    Attributes:
        label_names: Name of each tag by its index: in the order that the model has them, if it has; otherwise sorted.
        counts: As in `RecordData`; of the sentences encoded also `cut` (or `dropped`, `split`) and `words_lost` (beyond
            the maximum, or of no token).

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = TokenClassificationData("train.conll", val="valid.conll", tag_column=3)
    """

    row_word = "sentence"
    label_word = "tag"
    padding: ClassVar[dict[str, int]] = {"words": _NOT_A_START}
    needed = "words"
    of_words = True
    joins_pieces = True

    def __init__(
        self,
        train: Source | None = None,
        *,
        token_column: int | str | None = None,
        tag_column: int | str | None = None,
        tag_names: list[str | int] | None = None,
        **settings: Any,  # noqa: ANN401 - those of ColumnData
    ) -> None:
        super().__init__(train, **settings)
        self._given_names = [str(name) for name in tag_names or ()]
        self._most_words = 0
        self.token_column = token_column
        self.tag_column = tag_column
        self._read_files_with(conll=True, token_column=token_column, tag_column=tag_column)

    # Rows.

    def _fields_read(self, split: str) -> set[str]:
        named = {one for one in (self.token_column, self.tag_column) if isinstance(one, str)}
        return {*super()._fields_read(split), *_USUAL_COLUMNS.values(), *named}

    def row_of(self, record: Record, split: str) -> Row:
        """Return words and tags.

        Raises:
            DataError: There are no words, or not as many tags as words.
        """
        words = self._list(record, "token_column")
        if not words:
            raise DataError(
                f"{record.place}: the sentence has no tokens; take this row out, or give it at least one word."
            )
        self._most_words = max(self._most_words, len(words))
        group = " ".join(words).casefold()
        if kind_of(split) == "predict":
            return Row([words, []], group)
        tags = [self._name_of_tag(tag, record.place) for tag in self._list(record, "tag_column")]
        if len(tags) != len(words):
            raise DataError(
                f"{record.place}: {len(words)} tokens and {len(tags)} tags; each token needs one tag (the sentence "
                f"begins with {' '.join(words)[:40]!r})."
            )
        return Row([words, tags], group, tuple(dict.fromkeys(tags)))

    def _list(self, record: Record, setting: str) -> list[str]:
        """Return the words or tags of a record."""
        column = getattr(self, setting)
        # A file with one word a line has its own names, whatever the settings say.
        if column is None or kind_of_file(Path(record.source)) in CONLL:
            column = _USUAL_COLUMNS[setting]
        if isinstance(column, int):
            raise ConfigError(f"{setting} is {column}, and the columns of {record.source} have names; give one.")
        return _texts_of(cell_of(record, column, setting), are_tags=setting == "tag_column")

    def _name_of_tag(self, tag: str, place: str) -> str:
        """Return a tag by its name, where the source has its number."""
        names = self._given_names
        found = name_by_number(tag, names)
        if not names or found in names:
            return found
        raise DataError(
            f"{place}: the tag {tag!r} is neither among tag_names nor the number of one; expected 0 to "
            f"{len(names) - 1}, or one of {some_of(list(map(repr, names)), 30)}."
        )

    def check_labels(self, labels: Mapping[str, tuple[int, str]], num_rows: int) -> None:
        """Refuse training rows of a single tag, and warn of rows of one word each.

        Raises:
            DataError: They have less than two tags.
        """
        super().check_labels(labels, num_rows)
        if self._most_words == 1 and num_rows > 1:
            warn(
                f"{self.plan.source_name('train')}: each of its {num_rows} rows has a single word. If they are the "
                "words of sentences, put those of a sentence into one row, as lists of words and tags."
            )

    def _settle_labels(self) -> None:
        """Set the tag names like the label names of other data modules; numbers in the training source are not names.

        Raises:
            DataError: Nothing else gives names to numbers, or a tag is not among the names.
        """
        super()._settle_labels()
        has_names = self._given_names or self._known_labels()
        if not has_names and all(map(is_integer, self.label_names)):
            raise DataError(
                f"{self.plan.source_name('train')} has numbers for tags ({some_of(self.label_names)}), and it is not "
                "known which of them stands for no entity. Set tag_names to the names by number, such as [O, B-PER, "
                "I-PER]; where the numbers are the names, to those."
            )

    # Tokens.

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Tokenize sentences, and put each word's tag at its first token."""
        tokens = self._tokenize([row.content[0] for row in rows])
        for index, (row, pieces) in enumerate(zip(rows, tokens, strict=True)):
            words, tags = row.content
            numbered = [self._columns_from(piece, first_word=0) for piece in pieces]
            if len(pieces) > 1 and self.too_long == "split":
                numbered = self._split(words, tags if kind_of(split) != "predict" else [], pieces)
            kept = self._shortened(numbered, split, counts)
            if not kept:
                continue
            self._count_lost(row, kept, counts)
            if kind_of(split) != "predict":
                yield from ({"row": index, **one, "labels": self._labels_at(one["words"], tags)} for one in kept)
            elif self.too_long == "split":
                yield {"row": index, **joined(kept)}
            else:
                yield {"row": index, **kept[0]}

    def _tokenize(self, sentences: Sequence[Sequence[str]]) -> list[list[Tokens]]:
        return tokenize(self.tokenizer, sentences, self.max_length, of_words=True)

    def _columns_from(self, piece: Tokens, first_word: int) -> dict[str, list[int]]:
        return {**self._token_columns(piece), "words": _starts(piece.word_ids, first_word)}

    def _split(self, words: Sequence[str], tags: Sequence[str], pieces: Sequence[Tokens]) -> list[dict[str, list[int]]]:
        """Return the columns of each part of a sentence that is too long for one row."""
        num_tokens = Counter(word for piece in pieces for word in piece.word_ids)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        is_inside = [tag.startswith(_INSIDE) for tag in tags] or [False] * len(words)
        runs = runs_of_words([num_tokens[word] for word in range(len(words))], is_inside, room)
        parts = self._tokenize([words[run.start : run.stop] for run in runs])
        return [self._columns_from(part[0], run.start) for run, part in zip(runs, parts, strict=True)]

    def _labels_at(self, words: Sequence[int], tags: Sequence[str]) -> list[int]:
        return [UNSUPERVISED if word == _NOT_A_START else self.label_names.index(tags[word]) for word in words]

    def _count_lost(self, row: StoredRow, kept: Sequence[Mapping[str, Sequence[int]]], counts: Counter[str]) -> None:
        """Count the words without a token: those that were cut, and those such as control characters."""
        num_words = sum(word != _NOT_A_START for one in kept for word in one["words"])
        if not num_words:
            raise DataError(
                f"{row.place}: no word of the sentence has a token within the first {self.max_length}; set a larger "
                "max_length, or take the sentence out."
            )
        counts["words_lost"] += len(row.content[0]) - num_words

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of sentences that are left out or split, and of words that are lost."""
        super().tell_lost(split, {**lost, "cut": 0})
        if lost.get("words_lost"):
            rank_zero_warn(
                f"{lost['words_lost']} words of {len(self._rows(split))} {split} sentences of "
                f"{self.plan.source_name(split)} are neither learnt nor scored: they stand beyond the first "
                f"{self.max_length} tokens, or have none. Set a larger max_length to keep them, or too_long to split."
            )

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return the words, joined by spaces, and the tags."""
        return " ".join(content[0]), tuple(content[1])

    def complete_prediction(self, row: InputRow, prediction: Any) -> Any:  # noqa: ANN401 - the task's own type
        """Return tags and entities by the words of the input; words without a token have the tag None."""
        if not isinstance(prediction, Mapping) or not {"tags", "entities", "words"} <= prediction.keys():
            return prediction
        words, indices = row.content[0], prediction["words"]
        tags: list[str | None] = [None] * len(words)
        for index, tag in zip(indices, prediction["tags"], strict=True):
            tags[index] = tag
        entities = [_by_words(entity, words, indices) for entity in prediction["entities"]]
        return {"tags": tags, "entities": entities}

    def _collate(self) -> SentenceBatch:
        return SentenceBatch(self._pad())


def _by_words(entity: Mapping[str, Any], words: Sequence[str], indices: Sequence[int]) -> dict[str, Any]:
    """Return an entity whose start and end count tagged words, by all words."""
    start, end = indices[entity["start"]], indices[entity["end"] - 1] + 1
    return {"type": entity["type"], "start": start, "end": end, "text": " ".join(words[start:end])}


def runs_of_words(num_tokens: Sequence[int], is_inside: Sequence[bool], room: int) -> list[range]:
    """Divide the words of a sentence into runs of as many as fit into a row.

    Args:
        num_tokens: The number of tokens of each word.
        is_inside: Whether each word continues an entity; a run does not begin there if the entity fits into a row.
        room: The number of tokens that fit.

    Example:
        >>> runs_of_words([1, 2, 1, 1, 5, 1], is_inside=[False, False, False, True, False, False], room=4)
        [range(0, 2), range(2, 4), range(4, 5), range(5, 6)]
    """
    starts = [0]
    for word in range(len(num_tokens)):
        while word > starts[-1] and sum(num_tokens[starts[-1] : word + 1]) > room:
            outside = [one for one in range(starts[-1] + 1, word + 1) if not is_inside[one]]
            starts.append(outside[-1] if outside else word)
    return [range(*both) for both in itertools.pairwise([*starts, len(num_tokens)])]


def _starts(word_ids: Sequence[int | None], first_word: int) -> list[int]:
    """Return the word's index in its sentence at its first token, -1 elsewhere.

    Example:
        >>> _starts([None, 0, 1, 1, 3, None], first_word=10)
        [-1, 10, 11, -1, 13, -1]
    """
    before = [None, *word_ids]
    return [
        _NOT_A_START if word is None or word == last else first_word + word
        for word, last in zip(word_ids, before, strict=False)
    ]


def _texts_of(cell: Cell, *, are_tags: bool) -> list[str]:
    if isinstance(cell.value, str):
        text = cell.value.strip()
        # A sentence may stand in brackets; a list of words has quotation marks.
        if not is_bracketed(text) or not (are_tags or _LISTED_WORDS.match(text)):
            return text.split()
        listed = parsed_list(text)
        if listed is None:
            raise cell.refuse('a text in brackets must be a list, such as ["a", "b"].')
        cell = cell._replace(value=listed)
    if not isinstance(cell.value, list):
        raise cell.refuse("expected a list of words or tags.")
    return list(map(text_of, cell.entries()))
