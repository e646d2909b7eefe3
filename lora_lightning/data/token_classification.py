"""Sentences with one tag for each word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.batches.packing import UNSUPERVISED
from lora_lightning.data.record_data import RecordData
from lora_lightning.data.rows.cells import cell_of, check_known, sorted_labels, text_of
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.sources.files import CONLL
from lora_lightning.data.sources.text import kind_of_file
from lora_lightning.data.tokenizers import Tokens, padding_tokenizer, tokenize
from lora_lightning.errors import ConfigError, DataError

_NOT_A_START = -1
_TOKENS, _TAGS = "tokens", "tags"


class TokenClassificationData(RecordData):
    """Reads tagged sentences for `TokenClassification`; see `RecordData` for sources and splits.

    A source has a column of word lists and one of tag lists, or is a file with one word and its tag a line and an empty
    line between sentences (`.conll`, `.conllu`, `.iob`, `.iob2`, `.bio`, `.txt`), or a folder of such files. Copies of
    a sentence in `train` are dropped, and sentences of the same words stay in one split.

    Batches hold `input_ids` and `attention_mask`, `labels` (the tag's index at the first token of each word, -100
    elsewhere) and `words` (the word's index in its sentence at its first token, -1 elsewhere), `[batch, length]` each,
    padded on the right.

    Args:
        train: See `RecordData`.
        token_column: Column with the words: its number from 0 in a file with one word a line (None means 0), else its
            name (None means `tokens`).
        tag_column: Column with the tags: its number, negative from the end (None means the last), else its name (None
            means `tags`).
        tag_names: Names of the tags by their number, where the source has numbers.
        max_length: Tokens after which a sentence is too long; words beyond are neither learnt nor scored.
        **settings: See `RecordData`.

    Attributes:
        label_names: Name of each tag by its index: in the order that the model has them, if it has; otherwise sorted.
        counts: See `RecordData`; of the sentences encoded also `cut` (or `dropped`, `split`) and `words_lost` (beyond
            the maximum, or of no token).

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = TokenClassificationData("train.conll", val="valid.conll", tag_column=3)
    """

    needed = "words"

    def __init__(
        self,
        train: Source,
        *,
        token_column: int | str | None = None,
        tag_column: int | str | None = None,
        tag_names: list[str] | None = None,
        max_length: int = 128,
        **settings: Any,  # noqa: ANN401 - those of RecordData
    ) -> None:
        super().__init__(train, **settings)
        self.max_length = max_length
        self.tag_names = tag_names
        self._require_at_least(max_length=1)
        self._named = (
            token_column if isinstance(token_column, str) else _TOKENS,
            tag_column if isinstance(tag_column, str) else _TAGS,
        )
        read = replace(self.plan.settings, conll=True, token_column=token_column, tag_column=tag_column)
        self.plan = replace(self.plan, settings=read)

    # Rows.

    def reading_key(self) -> list[Any]:
        """Return the settings, and whether the model names the tags."""
        return [*super().reading_key(), bool(getattr(self._module(), "label_names", None))]

    def columns_read(self, split: str) -> dict[str, str]:
        """Return nothing: a CoNLL file's columns have no names, and `row_of` asks for each."""
        return {}

    def _fields_read(self, split: str) -> set[str]:
        return {*self._named, _TOKENS, _TAGS, *(one.column for one in self.plan.conditions)}

    def row_of(self, record: Record, split: str) -> Row:
        """Return words and tags.

        Raises:
            DataError: There are no words, or not as many tags as words.
        """
        tokens = self._words(record, 0)
        if not tokens:
            raise DataError(
                f"{record.place}: the sentence has no tokens; take this row out, or give it at least one word."
            )
        group = " ".join(tokens).casefold()
        if split == "predict":
            return Row([tokens, []], group)
        tags = [self._tag(tag, record.place) for tag in self._words(record, 1)]
        if len(tags) != len(tokens):
            raise DataError(
                f"{record.place}: {len(tokens)} tokens and {len(tags)} tags; each token needs one tag (the sentence "
                f"begins with {' '.join(tokens)[:40]!r})."
            )
        return Row([tokens, tags], group, tuple(dict.fromkeys(tags)))

    def _words(self, record: Record, which: int) -> list[str]:
        setting, usual = (("token_column", _TOKENS), ("tag_column", _TAGS))[which]
        given = (self.plan.settings.token_column, self.plan.settings.tag_column)[which]
        # A file with one word a line has its own names, whatever the settings say.
        is_conll = kind_of_file(Path(record.source)) in CONLL
        if isinstance(given, int) and not is_conll:
            raise ConfigError(f"{setting} is {given}, and the columns of {record.source} have names; give one.")
        column = usual if is_conll else self._named[which]
        return _words(cell_of(record, column, setting), record.place, column)

    def _tag(self, tag: str, place: str) -> str:
        """Return a tag by its name, where the source has its number."""
        if self.tag_names is None or tag in self.tag_names:
            return tag
        if tag.isdigit() and int(tag) < len(self.tag_names):
            return self.tag_names[int(tag)]
        raise DataError(
            f"{place}: the tag {tag!r} is neither among tag_names nor the number of one; expected 0 to "
            f"{len(self.tag_names) - 1}, or one of {', '.join(map(repr, self.tag_names[:30]))}."
        )

    def check_labels(self, labels: Mapping[str, tuple[int, str]], num_rows: int) -> None:
        """Refuse training sentences of a single tag, and tags that are numbers without names.

        Raises:
            DataError: They are.
        """
        source = self.plan.source_name("train")
        if len(labels) < 2:
            only = f"only the tag {next(iter(labels))!r}" if labels else "no tags"
            raise DataError(f"{source} has {only}; a tagger needs at least two.")
        has_names = self.tag_names or getattr(self._module(), "label_names", None)
        if not has_names and all(name.isdigit() for name in labels):
            shown = ", ".join(sorted_labels(labels)[:10])
            raise DataError(
                f"{source} has numbers for tags ({shown}), and it is not known which of them stands for no entity. "
                "Set tag_names to the names by number, such as [O, B-PER, I-PER]; where the numbers are the names, to "
                "those."
            )

    # Labels and tokens.

    def _settle_labels(self) -> None:
        """Name the tags: by the model if it knows them, else by `tag_names`, else by the training source."""
        saved = getattr(self._module(), "label_names", None)
        self.label_names = list(saved or self.tag_names or sorted_labels(self._about.labels.get("train", {})))
        whose = "the model does" if saved else "the training rows do"
        for split, labels in self._about.labels.items():
            check_known(labels, self.label_names, self.plan.source_name(split), split, whose, "tags")

    def load_tokenizer(self, name: str) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Return a tokenizer that can pad and takes words."""
        return padding_tokenizer(name, self.max_length, of_words=True)

    def encoding_key(self) -> list[Any]:
        """Return the length, and what becomes of longer sentences."""
        return [self.max_length, self.too_long]

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> dict[str, list[Any]]:
        """Tokenize sentences, and put each word's tag at its first token."""
        index_of = {name: index for index, name in enumerate(self.label_names)}
        columns: dict[str, list[Any]] = {"input_ids": [], "words": [], "row": []}
        tokens = tokenize(self.tokenizer, [row.content[0] for row in rows], self.max_length, of_words=True)
        for row, pieces in enumerate(tokens):
            tags = rows[row].content[1]
            for piece, starts in self._kept_pieces(pieces, rows[row], split, counts):
                columns["row"].append(row)
                columns["input_ids"].append(piece.ids)
                columns["words"].append(starts)
                if piece.type_ids:
                    columns.setdefault("token_type_ids", []).append(piece.type_ids)
                if split != "predict":
                    labels = [UNSUPERVISED if word == _NOT_A_START else index_of[tags[word]] for word in starts]
                    columns.setdefault("labels", []).append(labels)
        return columns

    def _kept_pieces(
        self, pieces: Sequence[Tokens], row: StoredRow, split: str, counts: Counter[str]
    ) -> list[tuple[Tokens, list[int]]]:
        """Return the pieces of a sentence that stay, with their words' starts; count what is lost."""
        too_long = "cut" if split == "predict" else self.too_long
        started: set[int] = set()
        found = []
        for piece in pieces if too_long == "split" else pieces[:1]:
            starts = _starts(piece.word_ids, started)
            started.update(starts)
            found.append((piece, starts))
        kept = started - {_NOT_A_START}
        if not kept:
            raise DataError(
                f"{row.place}: no word of the sentence has a token within the first {self.max_length}; set a larger "
                "max_length, or take the sentence out."
            )
        num_words = len(row.content[0])
        # Words of no token, such as control characters, are lost without a cut.
        is_long = len(pieces) > 1
        if is_long and too_long == "drop":
            counts["dropped"] += 1
            return []
        counts["split"] += int(is_long and too_long == "split")
        counts["cut"] += int(num_words - 1 not in kept)
        counts["words_lost"] += num_words - len(kept)
        return found

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of words that have no token, and of sentences that are left out."""
        whose = f"{len(self._rows(split))} {split} sentences of {self.plan.source_name(split)}"
        if lost.get("dropped"):
            rank_zero_warn(f"{lost['dropped']} of {whose} are longer than {self.max_length} tokens and were left out.")
        if lost.get("words_lost"):
            rank_zero_warn(
                f"{lost['words_lost']} words of {whose} are neither learnt nor scored: they stand beyond the first "
                f"{self.max_length} tokens, or have none. Set a larger max_length to keep them."
            )

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return the words, joined by spaces, and the tags."""
        return " ".join(content[0]), tuple(content[1])

    def _collate(self) -> PadToLongest:
        padding = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "words": _NOT_A_START,
        }
        return PadToLongest(padding)


def _starts(word_ids: Sequence[int | None], started: set[int]) -> list[int]:
    """Return the word's index at its first token, -1 elsewhere; not of words that have started before.

    Example:
        >>> _starts([None, 0, 1, 1, 3, None], set())
        [-1, 0, 1, -1, 3, -1]
    """
    starts, last = [], None
    for word in word_ids:
        is_start = word is not None and word != last and word not in started
        starts.append(word if is_start and word is not None else _NOT_A_START)
        last = word
    return starts


def _words(cell: Any, place: str, column: str) -> list[str]:  # noqa: ANN401 - whatever a record holds
    if isinstance(cell, str):
        return cell.split()
    if not isinstance(cell, list):
        raise DataError(f"{place}: the column {column!r} holds {str(cell)[:40]!r}; expected a list of words or tags.")
    if any(one is None for one in cell):
        raise DataError(f"{place}: the column {column!r} holds an empty entry; each token needs a text and a tag.")
    return [text_of(one, place, column) for one in cell]
