"""YAML files of dialogues, and files with one word and its tag a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lightning.data.sources.record import OnBad, ReadSettings, Record
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


def read_conll(path: Path, name: str, settings: ReadSettings, on_bad: OnBad) -> Iterator[Record]:
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
    sentence: list[tuple[int, list[str]]] = []
    lines = text_lines(path, name, settings.encoding)
    for number, line in enumerate([*lines, ""], start=1):
        bare = line.strip()
        if not bare:
            yield from _sentence(sentence, token_column, tag_column, name, on_bad)
            sentence = []
            continue
        fields = bare.split("\t") if "\t" in bare else bare.split()
        is_left_out = fields[0].startswith("-DOCSTART-") or (is_universal and not fields[0].isdigit())
        if not is_left_out:
            sentence.append((number, fields))


def _sentence(
    lines: list[tuple[int, list[str]]], token_column: int, tag_column: int, name: str, on_bad: OnBad
) -> Iterator[Record]:
    if not lines:
        return
    has_tags = any(len(fields) > 1 for _, fields in lines)
    columns = {"token_column": token_column}
    if has_tags:
        columns["tag_column"] = tag_column
    for number, fields in lines:
        error = _lacking(fields, columns, f"{name}, line {number}")
        if error is not None:
            on_bad(error, "\n".join(" ".join(fields) for _, fields in lines))
            return
    found = {"tokens": [fields[token_column].strip() for _, fields in lines]}
    if has_tags:
        found["tags"] = [fields[tag_column].strip() for _, fields in lines]
    yield Record(name, lines[0][0], "line", found)


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
