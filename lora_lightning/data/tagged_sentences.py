"""Sentences with one tag for each word, from CoNLL-style files and from tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_lightning.data.rows import text_of
from lora_lightning.data.tables import Table, read_text
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.paths import nearest_in_folder, resolve

CONLL_SUFFIXES = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".txt")
"""Ends of the names of files with one word a line."""
TOKENS, TAGS = "tokens", "tags"
Column = int | str


@dataclass(frozen=True)
class TaggedSentence:
    """Words and their tags.

    Args:
        place: Where the sentence stands, as messages begin.
        tokens: The words, at least one.
        tags: The tag of each word; empty where there are none.
    """

    place: str
    tokens: tuple[str, ...]
    tags: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """The words, which stay on one side of a split."""
        return " ".join(self.tokens).casefold()

    @property
    def content(self) -> list[Any]:
        """All that the sentence says."""
        return [self.tokens, self.tags]


def is_conll(source: str) -> bool:
    """Tell by its name whether a file has one word a line.

    Example:
        >>> is_conll("train.conll"), is_conll("train.jsonl")
        (True, False)
    """
    return source.lower().endswith(CONLL_SUFFIXES)


def read_conll(
    source: str, token_column: Column | None, tag_column: Column | None, encoding: str, *, tagged: bool
) -> Table:
    """Read a file with one word and its tag a line, and an empty line between sentences.

    Fields are separated by a tab, or where a line has none by spaces. Lines that begin with `-DOCSTART-`, and in a
    `.conllu` file comments and the words that a contraction stands for twice (`3-4`), are left out.

    Args:
        source: The file, or `pkg://package/file`.
        token_column: Number of the column with the words, from 0; None means 0, and 1 in a `.conllu` file.
        tag_column: Number of the column with the tags, from 0, or from the end if negative; None means the last, and in
            a `.conllu` file 3, the universal part of speech.
        encoding: Encoding of the file.
        tagged: Whether there must be tags.

    Returns:
        A table with the columns `tokens` and `tags`, a sentence a row.

    Raises:
        ConfigError: A column is named by a text.
        DataError: The file is not there, is empty, or a line has too few columns.
    """
    path, is_universal = resolve(source), source.lower().endswith(".conllu")
    if not path.is_file():
        raise DataError(f"{source} does not exist; {nearest_in_folder(path)}.")
    columns = {
        "token_column": _number("token_column", token_column, 1 if is_universal else 0, source),
        "tag_column": _number("tag_column", tag_column, 3 if is_universal else -1, source),
    }
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in enumerate(read_text(path, encoding, source).split("\n"), start=1):
        if not line.strip():
            sentences.append(([], []))
            continue
        fields = line.strip().split("\t") if "\t" in line.strip() else line.split()
        if fields[0].startswith("-DOCSTART-") or (is_universal and not fields[0].isdigit()):
            continue
        _require_columns(fields, columns if tagged else {"token_column": columns["token_column"]}, source, number)
        sentences[-1][0].append(fields[columns["token_column"]].strip())
        if tagged:
            sentences[-1][1].append(fields[columns["tag_column"]].strip())
    return _table(source, [sentence for sentence in sentences if sentence[0]])


def sentences_from(
    table: Table, token_column: Column | None, tag_column: Column | None, *, tagged: bool
) -> list[TaggedSentence]:
    """Take the sentences from a table whose cells are lists, or texts with spaces between the words.

    Args:
        table: The table.
        token_column: Name of the column with the words; None means `tokens`.
        tag_column: Name of the column with the tags: texts or whole numbers; None means `tags`.
        tagged: Whether there must be tags.

    Raises:
        ConfigError: A column is given by its number.
        DataError: A column is missing, a sentence has no words, or has not as many tags as words.
    """
    columns = {"token_column": _name("token_column", token_column, TOKENS, table.source)}
    if tagged:
        columns["tag_column"] = _name("tag_column", tag_column, TAGS, table.source)
    cells = [table.column(name, setting).tolist() for setting, name in columns.items()]
    found = []
    for index, *lists in zip(table.frame.index.tolist(), *cells, strict=True):
        place = f"{table.source}, row {index + 1}"
        tokens, *tags = [_words(cell, place, name) for cell, name in zip(lists, columns.values(), strict=True)]
        if not tokens:
            raise DataError(f"{place}: the sentence has no tokens; take this row out, or give it at least one word.")
        if tags and len(tags[0]) != len(tokens):
            raise DataError(
                f"{place}: {len(tokens)} tokens and {len(tags[0])} tags; each token needs one tag (the sentence begins "
                f"with {' '.join(tokens)[:40]!r})."
            )
        found.append(TaggedSentence(place, tokens, *tags))
    return found


def check_tags(split: str, source: str, sentences: Iterable[TaggedSentence], names: list[str], whose: str) -> None:
    """Make sure that every tag is among some names.

    Args:
        split: The split of the sentences, for the message.
        source: Where they come from.
        sentences: The sentences.
        names: The tags that there may be.
        whose: Whose tags these are, for the message.

    Raises:
        DataError: There are others.
    """
    known = set(names)
    unseen: dict[str, str] = {}
    for sentence in sentences:
        for tag in sentence.tags:
            if tag not in known:
                unseen.setdefault(tag, sentence.place)
    if unseen:
        shown = ", ".join(f"{tag!r} ({place})" for tag, place in list(unseen.items())[:5])
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        raise DataError(
            f"{source} has tags among its {split} rows that {whose} not have: {shown}{more}; "
            f"known are {', '.join(map(repr, names[:30]))}. "
            "Take these sentences out, or train with sentences that have these tags."
        )


def _table(source: str, sentences: list[tuple[list[str], list[str]]]) -> Table:
    import pandas as pd

    if not sentences:
        raise DataError(f"{source} holds no sentences; expected one word and its tag a line.")
    tokens, tags = [words for words, _ in sentences], [tags for _, tags in sentences]
    return Table(source, pd.DataFrame({TOKENS: pd.Series(tokens, dtype=object), TAGS: pd.Series(tags, dtype=object)}))


def _number(setting: str, column: Column | None, usual: int, source: str) -> int:
    if isinstance(column, str):
        raise ConfigError(
            f"{setting} is {column!r}, and {source} has columns without names; give a number, from 0 for the first or "
            "-1 for the last."
        )
    return usual if column is None else column


def _name(setting: str, column: Column | None, usual: str, source: str) -> str:
    if isinstance(column, int):
        raise ConfigError(f"{setting} is {column}, and the columns of {source} have names; give one.")
    return usual if column is None else column


def _require_columns(fields: list[str], columns: dict[str, int], source: str, number: int) -> None:
    place = f"{source}, line {number}"
    for setting, column in columns.items():
        if not -len(fields) <= column < len(fields):
            raise DataError(
                f"{place}: {len(fields)} columns ({' '.join(fields)[:40]!r}), and {setting} is {column}; expected a "
                "word and its tag, separated by spaces or a tab."
            )
    if len(columns) == 2 and len(fields) == 1:
        raise DataError(f"{place}: the token {fields[0]!r} has no tag; expected a word and its tag on each line.")


def _words(cell: Any, place: str, column: str) -> tuple[str, ...]:  # noqa: ANN401 - whatever a table holds
    if isinstance(cell, str):
        return tuple(cell.split())
    if hasattr(cell, "tolist"):  # an array, as Parquet gives it
        cell = cell.tolist()
    if not isinstance(cell, list | tuple):
        raise DataError(f"{place}: the column {column!r} holds {str(cell)[:40]!r}; expected a list of words or tags.")
    if any(one is None for one in cell):
        raise DataError(f"{place}: the column {column!r} holds an empty entry; each token needs a text and a tag.")
    return tuple(text_of(one, place, column) for one in cell)
