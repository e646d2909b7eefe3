"""YAML as data only: no duplicate keys, no tags that build objects, no alias bombs; errors have file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader

from lora_lightning.errors import ConfigError
from lora_lightning.wording import nearest, one_line

PARSER_MODE = "strict_yaml"
MAX_BYTES = 2**20
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Maximum number of values of a document with expanded aliases."""

_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A configuration file as it was written.

    Args:
        source: Path of the file, for messages.
        data: Its content.
        lines: Line of each key, counted from 1, by the path of keys that leads to it.
    """

    source: str
    data: dict[str, Any]
    lines: dict[KeyPath, int]


def read_document(path: str | Path) -> Document:
    """Read a configuration file.

    Args:
        path: The file.

    Raises:
        ConfigError: It is missing (the nearest names are given), too large, not UTF-8, not strict YAML, or does not
            hold a mapping.
    """
    path = Path(path)
    source = str(path)
    text = _read_text(path)
    lines = check_yaml(text, source)
    data = get_loader("yaml")(text)
    if isinstance(data, str):
        data = yaml.load(text, Loader=_Loader)  # jsonargparse's takes a lone `key:` for a string; the text is checked
    if not isinstance(data, dict):
        kind = "nothing" if data is None or not text.strip() else f"a {type(data).__name__}"
        raise ConfigError(f"{source}: expected a mapping (`key: value` lines) at the top, got {kind}.")
    return Document(source, data, lines)


def load_text(text: str) -> Any:  # noqa: ANN401 - whatever the YAML says
    """Load YAML strictly; a loader for jsonargparse's `set_loader`.

    Numbers such as `1e-3` are floats, dates stay strings.

    Raises:
        yaml.YAMLError: The text is not strict YAML. jsonargparse then takes it for a plain string.
    """
    try:
        check_yaml(text, "value")
    except ConfigError as error:
        raise yaml.YAMLError(str(error)) from error
    return get_loader("yaml")(text)


def register() -> None:
    """Make `parser_mode=PARSER_MODE` known to jsonargparse."""
    set_loader(PARSER_MODE, load_text, exceptions=(yaml.YAMLError,))


def check_yaml(text: str, source: str) -> dict[KeyPath, int]:
    """Check a YAML text event by event, before anything is built from it.

    Args:
        text: The YAML.
        source: Its name in messages, such as the file's path.

    Returns:
        The line of each key by the path of keys that leads to it; positions in lists count as keys.

    Raises:
        ConfigError: Syntax error, duplicate key, a tag other than YAML's plain ones, an alias of itself, a second
            document, or more depth or values than any configuration needs.
    """
    checker = _Checker(source)
    for event in _events(text, source):
        checker.take(event)
    return checker.lines


def _read_text(path: Path) -> str:
    if not path.exists():
        raise ConfigError(f"there is no config file {str(path)!r}{_nearest_files(path)}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: a config file of more than {MAX_BYTES // 2**20} MiB is not read; is it data?")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file.") from error


def _nearest_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {str(folder)!r} does not exist either"
    names = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in (".yaml", ".yml", ".json")]
    near = [str(folder / name) for name in nearest(path.name, names) or names[:3]]
    return f"; nearest there: {', '.join(near)}" if near else f"; no YAML file is in {str(folder)!r}"


def _events(text: str, source: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or one_line(error)
        raise ConfigError(f"{where}: not valid YAML ({problem}).") from error


@dataclass
class _Level:
    """A mapping or list that is being read."""

    is_mapping: bool
    anchor: str | None
    num_nodes: int = 1
    key: str | None = None  # a mapping's key whose value comes next
    keys: set[str] = field(default_factory=set)
    length: int = 0


class _Checker:
    """State of the check of a document."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.levels: list[_Level] = []
        self.anchors: dict[str, int] = {}  # number of nodes behind each finished anchor
        self.num_documents = 0

    def take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.DocumentStartEvent):
            self.num_documents += 1
            if self.num_documents > 1:
                self.fail(line, "a second document starts with `---`; keep one to a file")
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor is None or event.anchor not in self.anchors:
                self.fail(line, f"the alias `*{event.anchor}` contains itself or comes before its anchor")
            self.add_node(line, self.anchors[event.anchor], f"*{event.anchor}")
        elif isinstance(event, yaml.ScalarEvent):
            self.check_tag(event.tag, line)
            self.add_node(line, 1, event.value)
            if event.anchor:
                self.anchors[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            self.check_tag(event.tag, line)
            self.open_level(event, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.close_level(line)

    def open_level(self, event: yaml.CollectionStartEvent, line: int) -> None:
        parent = self.levels[-1] if self.levels else None
        if parent is not None and parent.is_mapping and parent.key is None:
            self.fail(line, "a key must be a single word, not a list or mapping; check the indentation and brackets")
        if parent is not None and not parent.is_mapping:
            self.lines.setdefault((*self.path(), str(parent.length)), line)
        self.levels.append(_Level(isinstance(event, yaml.MappingStartEvent), event.anchor))
        if len(self.levels) > MAX_DEPTH:
            self.fail(line, f"nested deeper than {MAX_DEPTH} levels")

    def close_level(self, line: int) -> None:
        level = self.levels.pop()
        if level.anchor:
            self.anchors[level.anchor] = level.num_nodes
        if self.levels:
            self.add_value(line, level.num_nodes)

    def add_node(self, line: int, num_nodes: int, text: str) -> None:
        """Process a scalar or alias: a key if the mapping expects one, else a value."""
        if not self.levels:
            return
        level = self.levels[-1]
        if not level.is_mapping or level.key is not None:
            self.add_value(line, num_nodes)
            return
        if text in level.keys:
            first = self.lines[(*self.path(), text)]
            self.fail(line, f"the key `{text}` is there twice (first in line {first}); keep one of them")
        level.keys.add(text)
        self.lines[(*self.path(), text)] = line
        level.key = text

    def add_value(self, line: int, num_nodes: int) -> None:
        level = self.levels[-1]
        if not level.is_mapping:
            self.lines.setdefault((*self.path(), str(level.length)), line)
        level.key = None
        level.length += 1
        level.num_nodes += num_nodes
        if level.num_nodes > MAX_NODES:
            self.fail(line, f"more than {MAX_NODES:,} values once its aliases are written out")

    def path(self) -> KeyPath:
        """Return the keys and positions that lead to the innermost level."""
        outer = self.levels[:-1]
        return tuple(level.key or "" if level.is_mapping else str(level.length) for level in outer)

    def check_tag(self, tag: str | None, line: int) -> None:
        if tag is None or tag == "!" or tag in _PLAIN_TAGS:
            return
        shown = tag.replace("tag:yaml.org,2002:", "!!")
        self.fail(line, f"the tag `{shown}` is not allowed: a config holds plain data; name classes with class_path")

    def fail(self, line: int, problem: str) -> NoReturn:
        raise ConfigError(f"{self.source}, line {line}: {problem}.")
