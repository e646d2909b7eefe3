"""Typed tables: Parquet files, folders that `datasets` saved, and data in memory."""

from __future__ import annotations

import datetime
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lightning.data.sources.record import ReadSettings, Record
from lora_lightning.data.sources.text import COMPRESSED, open_bytes
from lora_lightning.errors import DataError

_READ_TOGETHER = 1000


def read_parquet(path: Path, name: str, settings: ReadSettings) -> Iterator[Record]:  # noqa: ARG001 - as all readers
    """Read the rows of a Parquet file; a file that `datasets` wrote contains the names of its classes.

    Raises:
        DataError: It is not a Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(_seekable(path, name)) as file:
            classed = _classed_in(file.schema_arrow)
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=_READ_TOGETHER))
            rows = (fields for batch in batches for fields in batch)
            yield from numbered(name, (_named(fields, classed) for fields in rows))
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{name} cannot be read as Parquet: {reason}") from error


def read_dataset(rows: Any, name: str) -> Iterator[Record]:  # noqa: ANN401 - a datasets.Dataset
    """Read the rows of a data set, its classes by their names."""
    classed = _classed(rows.features)
    yield from numbered(name, _rows_of(rows, classed))


def read_frame(frame: Any, name: str) -> Iterator[Record]:  # noqa: ANN401 - a pandas.DataFrame
    """Read the rows of a data frame; NaN is an absent cell, and whole numbers are not fractions."""
    columns = named_apart([str(column) for column in frame.columns])
    named = frame.set_axis(columns, axis=1)
    whole = [column for column in columns if _is_whole(named[column])]
    rows = named.astype(dict.fromkeys(whole, "Int64")).itertuples(index=False, name=None)
    yield from numbered(name, (dict(zip(columns, cells, strict=True)) for cells in rows))


def numbered(name: str, rows: Iterable[Mapping[str, Any]], *, drops_nulls: bool = True) -> Iterator[Record]:
    """Return rows as records in plain types (see `plain`), counted from 1."""
    for number, fields in enumerate(rows, start=1):
        cells = {str(column): plain(cell, drops_nulls=drops_nulls) for column, cell in fields.items()}
        yield Record(name, number, "row", cells)


def named_apart(columns: list[str]) -> list[str]:
    """Return names of columns; duplicates get their numbers, so that none is used by mistake.

    A column without a name is named by its number.

    Example:
        >>> named_apart(["label", "text", "label", ""])
        ['label (column 1)', 'text', 'label (column 3)', '(column 4)']
    """
    times = Counter(columns)
    numbers = [f"(column {n})" for n in range(1, len(columns) + 1)]
    pairs = zip(columns, numbers, strict=True)
    return [f"{name} {number}".strip() if times[name] > 1 or not name else name for name, number in pairs]


def plain(value: Any, *, drops_nulls: bool = True) -> Any:  # noqa: ANN401 - whatever a table holds
    """Return a cell in plain types.

    Args:
        value: What stands in the cell.
        drops_nulls: Remove keys that are null in a nested object: typed tables give each object the keys of all others.

    Example:
        >>> plain([{"city": "Rome", "zone": None}])
        [{'city': 'Rome'}]
    """
    if isinstance(value, Mapping):
        kept = {str(key): one for key, one in value.items() if not (drops_nulls and one is None)}
        return {key: plain(one, drops_nulls=drops_nulls) for key, one in kept.items()}
    if isinstance(value, list | tuple):
        return [plain(one, drops_nulls=drops_nulls) for one in value]
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return plain(value.tolist())
    is_absent = value is None or type(value).__name__ in ("NAType", "NaTType")
    if is_absent or (isinstance(value, float) and math.isnan(value)):
        return None
    is_time = isinstance(value, datetime.date | datetime.time | datetime.timedelta)
    return str(value) if is_time else value


def _seekable(path: Path, name: str) -> Path | io.BytesIO:
    """Return a file that Arrow can read out of order; the decompressed content of a compressed file."""
    if path.suffix.lower() not in COMPRESSED:
        return path
    with open_bytes(path, name) as file:
        return io.BytesIO(file.read())


def _classed(features: Mapping[str, Any]) -> dict[str, Any]:
    """Return the features of a data set that hold classes."""
    return {column: feature for column, feature in features.items() if "ClassLabel" in str(feature)}


def _classed_in(schema: Any) -> dict[str, Any]:  # noqa: ANN401 - a pyarrow.Schema
    """Return the features that hold classes, if `datasets` stored them in a schema."""
    if b"ClassLabel" not in (schema.metadata or {}).get(b"huggingface", b""):
        return {}
    import datasets

    return _classed(datasets.Features.from_arrow_schema(schema))


def _named(fields: Mapping[str, Any], classed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of a row with the names of classes instead of their numbers."""
    return {**fields, **{column: _with_names(fields[column], feature) for column, feature in classed.items()}}


def _rows_of(rows: Any, classed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - a datasets.Dataset
    for batch in rows.with_format(None).iter(_READ_TOGETHER):
        for column, feature in classed.items():
            batch[column] = [_with_names(cell, feature) for cell in batch[column]]
        for cells in zip(*batch.values(), strict=True):
            yield dict(zip(batch, cells, strict=True))


def _with_names(cell: Any, feature: Any) -> Any:  # noqa: ANN401 - whatever a feature of datasets describes
    """Return a cell with the names of classes instead of their numbers; -1 stands for none."""
    if cell is None:
        return None
    if type(feature).__name__ == "ClassLabel":
        return feature.names[cell] if cell >= 0 else None
    if isinstance(feature, Mapping):
        return {key: _with_names(cell[key], feature[key]) for key in cell}
    inner = getattr(feature, "feature", None)
    return cell if inner is None else [_with_names(one, inner) for one in cell]


def _is_whole(column: Any) -> bool:  # noqa: ANN401 - a pandas.Series
    """Return whether a column of fractions holds whole numbers only, as pandas keeps those with gaps."""
    if column.dtype.kind != "f" or not column.isna().any():
        return False
    present = column.dropna()
    are_whole = (present == present.round()) & (present.abs() < 2**53)
    return bool(are_whole.all())
