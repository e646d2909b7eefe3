"""Files with one word and its tag a line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.data.sources.record import Broken, ReadSettings, Record
from lora_lightning.data.sources.text import Undecoded, kind_of_file, text_lines
from lora_lightning.errors import ConfigError, DataError

_Word = tuple[int, list[str]]
"""A line's number and its fields."""
_ASSIGNMENT = re.compile(r"#\s*[\w:-]+( \w+)? = ")
_FEWEST_COUNTED = 3


def read_conll(path: Path, name: str, settings: ReadSettings) -> Iterator[Record | Broken]:
    """Read sentences, each from a line to the next empty one, as `tokens` and `tags`.

    Fields are separated by a tab, or by spaces if a line has no tab. Lines that begin with `-DOCSTART-`, comments
    before a sentence (`# text = ...`, or another number of fields than its words have), and in a `.conllu` file the
    lines of contractions (`3-4`) are skipped. A line of one field has no tag; a sentence of only such lines has no
    `tags`.

    Raises:
        ConfigError: A column is given by a name.
        DataError: The first column numbers the words, and no setting names another.
    """
    is_universal = kind_of_file(path) == ".conllu"
    token_column = _number("token_column", settings.token_column, 1 if is_universal else 0, name)
    tag_column = _number("tag_column", settings.tag_column, 3 if is_universal else -1, name)
    lines = enumerate(text_lines(path, name, settings.encoding), start=1)
    for is_empty, block in itertools.groupby(lines, lambda line: not line[1].strip()):
        if is_empty:
            continue
        sentence = list(block)
        undecoded = next((line for _, line in sentence if isinstance(line, Undecoded)), None)
        if undecoded is not None:
            yield Broken(undecoded.error, "".join(line for _, line in sentence))
            continue
        words = _words_of(sentence, is_universal=is_universal)
        if settings.token_column is None and not is_universal:
            _check_unnumbered(words, name)
        if words:
            yield _sentence(words, token_column, tag_column, name)


def _words_of(sentence: list[tuple[int, str]], *, is_universal: bool) -> list[_Word]:
    """Return the lines of a sentence that hold words."""
    split = [(number, _fields(line)) for number, line in sentence]
    if is_universal:
        return [(number, fields) for number, fields in split if fields[0].isdigit()]
    inside = [(number, fields) for number, fields in split if not fields[0].startswith("-DOCSTART-")]
    usual = len(split[-1][1])
    return list(itertools.dropwhile(lambda line: _is_comment(line[1], usual), inside))


def _is_comment(fields: list[str], usual: int) -> bool:
    """Return whether a line before the words of a sentence is a comment; a hash may be a word, too."""
    return fields[0].startswith("#") and (len(fields) != usual or bool(_ASSIGNMENT.match(" ".join(fields))))


def _check_unnumbered(words: list[_Word], name: str) -> None:
    """Refuse words that are the numbers 1, 2, 3 and so on, though there are further columns."""
    firsts = [fields[0] for _, fields in words]
    is_counted = firsts == [str(number) for number in range(1, len(firsts) + 1)]
    if is_counted and len(firsts) >= _FEWEST_COUNTED and all(len(fields) > 2 for _, fields in words):
        raise DataError(
            f"{name}, line {words[0][0]}: the first column numbers the words of the sentence. Set token_column to the "
            "column of the words (1 is the second), or to 0 if these numbers are the words."
        )


def _fields(line: str) -> list[str]:
    bare = line.strip()
    return bare.split("\t") if "\t" in bare else bare.split()


def _sentence(words: list[_Word], token_column: int, tag_column: int, name: str) -> Record | Broken:
    has_tags = any(len(fields) > 1 for _, fields in words)
    columns = {"token_column": token_column}
    if has_tags:
        columns["tag_column"] = tag_column
    for number, fields in words:
        error = _lacking(fields, columns, f"{name}, line {number}")
        if error is not None:
            return Broken(error, "\n".join(" ".join(fields) for _, fields in words))
    found = {"tokens": [fields[token_column].strip() for _, fields in words]}
    if has_tags:
        found["tags"] = [fields[tag_column].strip() for _, fields in words]
    return Record(name, words[0][0], "line", found)


def _lacking(fields: list[str], columns: dict[str, int], place: str) -> DataError | None:
    """Return the error for a line that lacks a column."""
    for setting, column in columns.items():
        if not -len(fields) <= column < len(fields):
            return DataError(
                f"{place}: {len(fields)} columns ({' '.join(fields)[:40]!r}), and {setting} is {column}; expected a "
                "word and its tag, separated by spaces or a tab."
            )
    if len(columns) == 2 and len(fields) == 1:
        return DataError(f"{place}: the token {fields[0]!r} has no tag; expected a word and its tag on each line.")
    return None


def _number(setting: str, column: int | str | None, usual: int, name: str) -> int:
    if isinstance(column, str):
        raise ConfigError(
            f"{setting} is {column!r}, and {name} has columns without names; give a number, from 0 for the first or "
            "-1 for the last."
        )
    return usual if column is None else column
