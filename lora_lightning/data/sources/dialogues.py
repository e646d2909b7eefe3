"""YAML files of dialogues, and files with one word and its tag a line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lightning.data.sources.record import Broken, ReadSettings, Record
from lora_lightning.data.sources.text import kind_of_file, text_lines
from lora_lightning.errors import ConfigError, DataError

_MAX_DEPTH = 64


def read_dialogues(path: Path, name: str, settings: ReadSettings) -> Iterator[Record]:
    """Read chatterbot's dialogues: a list of lists of texts under `conversations`; scalars stay as they are written.

    Raises:
        DataError: The file is no valid YAML, or holds no dialogues.
    """
    import yaml

    text = "".join(text_lines(path, name, settings.encoding))
    try:
        root = _compose(text, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DataError(f"{name}{where}: this is no valid YAML ({reason}).") from error
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    dialogues = next((value for key, value in pairs if key.value == "conversations"), None)
    if not isinstance(dialogues, yaml.SequenceNode):
        raise DataError(f"{name} holds no dialogues: expected a list of lists of texts under 'conversations'.")
    for node in dialogues.value:
        turns = node.value if isinstance(node, yaml.SequenceNode) else [node]
        texts = [turn.value if isinstance(turn, yaml.ScalarNode) else None for turn in turns]
        yield Record(name, node.start_mark.line + 1, "line", {"dialogue": texts})


def read_conll(path: Path, name: str, settings: ReadSettings) -> Iterator[Record | Broken]:
    """Read sentences, each from a line to the next empty one, as `tokens` and `tags`.

    Fields are separated by a tab, or where a line has none by spaces. Lines that begin with `-DOCSTART-`, and in a
    `.conllu` file comments and the words that a contraction stands for twice (`3-4`), are left out. A line of one field
    has no tag; a sentence of such lines alone has no `tags`.

    Raises:
        ConfigError: A column is named by a text.
    """
    is_universal = kind_of_file(path) == ".conllu"
    token_column = _number("token_column", settings.token_column, 1 if is_universal else 0, name)
    tag_column = _number("tag_column", settings.tag_column, 3 if is_universal else -1, name)
    lines = enumerate(text_lines(path, name, settings.encoding), start=1)
    for is_empty, block in itertools.groupby(lines, lambda line: not line[1].strip()):
        if is_empty:
            continue
        split = [(number, _fields(line)) for number, line in block]
        words = [(number, fields) for number, fields in split if _is_word(fields, is_universal)]
        if words:
            yield _sentence(words, token_column, tag_column, name)


def _fields(line: str) -> list[str]:
    bare = line.strip()
    return bare.split("\t") if "\t" in bare else bare.split()


def _is_word(fields: list[str], is_universal: bool) -> bool:
    return fields[0].isdigit() if is_universal else not fields[0].startswith("-DOCSTART-")


def _sentence(words: list[tuple[int, list[str]]], token_column: int, tag_column: int, name: str) -> Record | Broken:
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


def _compose(text: str, name: str) -> Any:  # noqa: ANN401 - one of yaml's nodes
    """Parse YAML into nodes, after a look at its depth: libyaml composes nested nodes until the process crashes."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise DataError(
                f"{name}, line {line}: nested more than {_MAX_DEPTH} levels deep; expected a list "
                "of lists of texts under 'conversations'."
            )
    return yaml.compose(text, Loader=loader)
