"""Read records one after another from JSON lines, Parquet, YAML dialogues, folders of these, or the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.data.tables import hub_rows, is_hub_name
from lora_lightning.errors import DataError
from lora_lightning.paths import nearest_in_folder, resolve

_YAML = (".yml", ".yaml")
_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_LINES, ".parquet", *_YAML)
_MAX_DEPTH = 64
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One record and where it stands.

    Args:
        source: The file, as messages name it.
        number: Its line (JSON lines, YAML), entry (JSON array) or row (Parquet, Hub), from 1.
        unit: Which of these.
        fields: Its fields.
    """

    source: str
    number: int
    unit: str
    fields: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Where the record stands, as messages begin."""
        return f"{self.source}, {self.unit} {self.number}"


def is_hub_source(source: str) -> bool:
    """Tell whether a source is meant as the name of a Hub data set.

    Example:
        >>> is_hub_source("tatsu-lab/alpaca"), is_hub_source("talk/english.yml")
        (True, False)
    """
    return is_hub_name(source) and not source.lower().endswith(SUFFIXES)


def files_of(source: str) -> list[tuple[Path, str]]:
    """Return the files that a local source consists of, each with the name that messages give it.

    Args:
        source: A file, a folder with such files, or either of them inside a package (`pkg://package/folder`).

    Raises:
        DataError: It is not there, is of another kind, or is empty.
    """
    path = resolve(source)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES]
        if not files:
            raise DataError(
                f"The folder {source} holds no file that ends in {', '.join(SUFFIXES)}; "
                f"{nearest_in_folder(path / 'train.jsonl')}."
            )
        return [(file, f"{source.rstrip('/')}/{file.name}") for file in files]
    if not path.is_file():
        raise DataError(f"{source} does not exist; {nearest_in_folder(path)}.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{source} is of an unknown kind: expected a name that ends in {', '.join(SUFFIXES)}, a folder of such "
            "files, or a Hub data set."
        )
    return [(path, source)]


def read_records(
    source: str, role: str = "train", subset: str | None = None, wanted: Callable[[int], bool] | None = None
) -> Iterator[Record]:
    """Read the records of a source one by one; a file is never held as a whole, unless it is one JSON array or YAML.

    Args:
        source: A `.jsonl` (`.ndjson`, `.json`), `.parquet` or `.yml` (`.yaml`) file, a folder of such files, either of
            them inside a package, or the name of a Hub data set.
        role: `train`, `val` or `test`: which split of a Hub data set is meant.
        subset: The configuration of a Hub data set that has several.
        wanted: Tells by a record's place in the whole source, from 0, whether it is wanted; lines that are not are
            skipped without being parsed. None wants all.

    Raises:
        DataError: The source is not there, is malformed, or is empty.
    """
    wanted = wanted or (lambda _: True)
    if is_hub_source(source):
        rows = enumerate(hub_rows(source, subset, role))
        yield from (Record(source, place + 1, "row", fields) for place, fields in rows if wanted(place))
        return
    start = 0
    for path, name in files_of(source):
        for record in _read_file(path, name, _shifted(wanted, start)):
            start += 1
            if record is not None:
                yield record
    if not start:
        raise DataError(f"{source} holds no records; give a file with at least one.")


def _shifted(wanted: Callable[[int], bool], start: int) -> Callable[[int], bool]:
    return lambda place: wanted(start + place)


def _read_file(path: Path, name: str, wanted: Callable[[int], bool]) -> Iterator[Record | None]:
    """Yield each record, or None for one that is not wanted."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path, name, wanted)
    if suffix in _YAML:
        return (record if wanted(place) else None for place, record in enumerate(_from_yaml(path, name)))
    with path.open("rb") as file:
        opening = file.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()
    if opening.startswith(b"["):
        return (record if wanted(place) else None for place, record in enumerate(_from_array(path, name)))
    return _from_lines(path, name, wanted)


def _from_lines(path: Path, name: str, wanted: Callable[[int], bool]) -> Iterator[Record | None]:
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            raw = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not raw.strip():
                continue
            yield _record(_parse_json(raw, name, number), name, number, "line") if wanted(place) else None
            place += 1


def _from_array(path: Path, name: str) -> Iterator[Record]:
    entries = _parse_json(path.read_bytes().removeprefix(_BYTE_ORDER_MARK), name, 1)
    for number, entry in enumerate(entries, start=1):
        yield _record(entry, name, number, "entry")


def _from_parquet(path: Path, name: str, wanted: Callable[[int], bool]) -> Iterator[Record | None]:
    import pyarrow
    import pyarrow.parquet

    place = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    yield Record(name, place + 1, "row", fields) if wanted(place) else None
                    place += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{name} cannot be read as Parquet: {reason}") from error


def _from_yaml(path: Path, name: str) -> Iterator[Record]:
    """Read chatterbot's dialogues: a list of lists of texts under `conversations`; scalars stay as they are written."""
    import yaml

    try:
        root = _compose(path.read_text("utf-8"), name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise DataError(f"{name}{where}: this is no valid YAML ({getattr(error, 'problem', error)}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    dialogues = next((value for key, value in pairs if key.value == "conversations"), None)
    if not isinstance(dialogues, yaml.SequenceNode):
        raise DataError(f"{name} holds no dialogues: expected a list of lists of texts under 'conversations'.")
    for node in dialogues.value:
        turns = node.value if isinstance(node, yaml.SequenceNode) else [node]
        texts = [turn.value if isinstance(turn, yaml.ScalarNode) else None for turn in turns]
        yield Record(name, node.start_mark.line + 1, "line", {"dialogue": texts})


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


def _record(value: object, name: str, number: int, unit: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f'{name}, {unit} {number}: expected an object such as {{"messages": [...]}}, got {str(value)[:40]!r}.'
        )
    return Record(name, number, unit, value)


def _parse_json(raw: bytes, name: str, line: int) -> Any:  # noqa: ANN401 - whatever stands there
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = line + raw.count(b"\n", 0, error.start)
        raise DataError(f"{name}, line {at}: this is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}, line {line + error.lineno - 1}: this is no valid JSON ({error.msg}, column {error.colno}); "
            "expected one object a line."
        ) from error
    except RecursionError as error:
        raise DataError(f"{name}, line {line}: nested too deeply to be a conversation.") from error
