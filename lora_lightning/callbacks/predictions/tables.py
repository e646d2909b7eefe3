"""Files of predictions: CSV, JSON lines and Parquet, written row by row to a temporary file and then renamed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_lightning.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index"
_ROWS_TOGETHER = 5_000
Row = dict[str, Any]
Rows = Callable[[], Iterator[Row]]
PredictedRow = tuple[int, Mapping[str, Any], Mapping[str, Any]]
"""The index of a row, its own fields, and the columns of its prediction."""


def check_format(path: str) -> None:
    """Refuse a file name whose suffix does not name a format.

    Raises:
        ConfigError: It does not.
    """
    if Path(path).suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path} has the ending {Path(path).suffix!r}; expected one of {', '.join(_FORMATS)}.")


def write_table(path: Path, predicted: Iterable[PredictedRow]) -> int:
    """Write predictions and their rows to a file whose suffix names its format.

    The columns are `index`, those of the rows, and those of the predictions. A column of the rows whose name is taken
    gets `input_` in front.

    Args:
        path: The file; an existing file is replaced when the new one is complete.
        predicted: The rows in order. They are never all in memory.

    Returns:
        The number of rows.
    """
    rows_path, aside = path.with_name(f"{path.name}.rows"), path.with_name(f"{path.name}.partial")
    try:
        with rows_path.open("w", encoding="ascii") as file:
            num_rows, names, answers = _write_rows(file, predicted)
        name_of = _names_apart(names, answers)

        def rows() -> Iterator[Row]:
            with rows_path.open(encoding="ascii") as file:
                for line in file:
                    index, fields, answer = json.loads(line)
                    yield {INDEX: index, **{name_of[name]: value for name, value in fields.items()}, **answer}

        columns = [INDEX, *name_of.values(), *answers]
        _FORMATS[path.suffix.lower()](aside, rows, columns)
        aside.replace(path)
    finally:
        rows_path.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)
    return num_rows


def _write_rows(file: IO[str], predicted: Iterable[PredictedRow]) -> tuple[int, list[str], list[str]]:
    """Write rows to a temporary file until all columns are known; return their number and both kinds of columns."""
    num_rows = 0
    names, answers = dict[str, None](), dict[str, None]()
    for index, fields, answer in predicted:
        file.write(json.dumps([index, fields, answer]) + "\n")
        names.update(dict.fromkeys(fields))
        answers.update(dict.fromkeys(answer))
        num_rows += 1
    return num_rows, list(names), list(answers)


def _names_apart(names: Iterable[str], answers: Iterable[str]) -> dict[str, str]:
    """Return a name for each column of the rows that differs from the columns of the predictions.

    Example:
        >>> _names_apart(["text", "index"], ["predicted_label"])
        {'text': 'text', 'index': 'input_index'}
    """
    names = list(names)
    taken = {INDEX, *answers}
    apart: dict[str, str] = {}
    for name in names:
        free = name
        while free in taken or (free != name and free in names):
            free = f"input_{free}"
        taken.add(free)
        apart[name] = free
    return apart


def _write_csv(path: Path, rows: Rows, columns: list[str]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows():
            writer.writerow([_cell(row.get(name)) for name in columns])


def _write_lines(path: Path, rows: Rows, columns: list[str]) -> None:
    del columns
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())


def _write_parquet(path: Path, rows: Rows, columns: list[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = _schema_of(rows, columns)
    with parquet.ParquetWriter(path, schema) as writer:
        found = rows()
        while some := list(islice(found, _ROWS_TOGETHER)):
            arrays = [pa.array([_of_type(row.get(one.name), one.type) for row in some], one.type) for one in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _schema_of(rows: Rows, columns: list[str]) -> pa.Schema:
    """Return a type for each column that all of its values have; values of different kinds become texts."""
    import pyarrow as pa

    types: dict[str, Any] = dict.fromkeys(columns, pa.null())
    found = rows()
    while some := list(islice(found, _ROWS_TOGETHER)):
        for name, known in types.items():
            if known != pa.string():
                types[name] = _joined(known, [_encodable(row.get(name)) for row in some])
    return pa.schema([pa.field(name, pa.string() if pa.types.is_null(one) else one) for name, one in types.items()])


def _joined(known: pa.DataType, values: list[Any]) -> pa.DataType:
    """Return the common type of values and of a known type; text if there is none."""
    import pyarrow as pa

    try:
        here = pa.array(values).type
        fields = [pa.schema([pa.field("value", one)]) for one in (known, here)]
        joined = pa.unify_schemas(fields, promote_options="permissive").field("value").type
        return pa.string() if _has_empty_struct(joined) else joined
    except (pa.ArrowException, OverflowError):
        return pa.string()


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Return whether a type holds mappings without entries, which Parquet cannot write."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_has_empty_struct(one.type) for one in kind)
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)


def _of_type(value: Any, kind: pa.DataType) -> Any:  # noqa: ANN401 - plain data of any shape
    import pyarrow as pa

    value = _encodable(value)
    if pa.types.is_string(kind) and value is not None and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value


def _encodable(value: Any) -> Any:  # noqa: ANN401 - plain data of any shape
    """Return a value whose texts UTF-8 can encode: lone surrogates, which JSON can hold, are escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, list):
        return [_encodable(one) for one in value]
    return {name: _encodable(one) for name, one in value.items()} if isinstance(value, dict) else value


def _cell(value: Any) -> Any:  # noqa: ANN401 - plain data of any shape
    """Return a value as a cell of a CSV file: lists, mappings and truth values as JSON."""
    if isinstance(value, list | dict | bool):
        return json.dumps(value, ensure_ascii=False)
    return value


_FORMATS: dict[str, Callable[[Path, Rows, list[str]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_lines,
    ".ndjson": _write_lines,
    ".parquet": _write_parquet,
}
