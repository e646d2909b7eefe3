"""Encoded rows as Arrow columns: written batch by batch, read through a memory map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

_ROWS_IN_A_BATCH = 10_000


class ListColumn:
    """A column of lists of numbers, each read as an array that shares the column's memory.

    Args:
        column: An Arrow column of lists.

    Example:
        >>> import pyarrow
        >>> ListColumn(pyarrow.chunked_array([[[1, 2]], [[3]]]))[0].tolist()
        [1, 2]
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._values = [_array_of(chunk.values) for chunk in chunks]
        self._offsets = [_array_of(chunk.offsets) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """Return one list."""
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[chunk - 1]) if chunk else 0
        offsets = self._offsets[chunk]
        return self._values[chunk][offsets[index - start] : offsets[index - start + 1]]


class EncodedRows(Dataset[dict[str, Any]]):
    """Encoded rows, by columns.

    Args:
        columns: An Arrow file that `write_columns` wrote, or a mapping from name to one list (or number) a row. The
            rows' lengths are the column `length`, or else the number of their `input_ids`.

    Attributes:
        lengths: Number of tokens of each row `[rows]`.
        origins: Index of the row that each was encoded from, the column `row` `[rows]`.
    """

    def __init__(self, columns: Path | Mapping[str, Sequence[Any]]) -> None:
        self._source = columns
        self._open()

    def _open(self) -> None:
        table = read_table(self._source) if isinstance(self._source, Path) else _table_of(self._source)
        self.columns: dict[str, Any] = {name: _readable(table[name]) for name in table.column_names}
        self.origins = self.columns.pop("row", np.arange(len(table)))
        lengths = self.columns.pop("length", None)
        if lengths is None:
            lengths = np.array([len(self.columns["input_ids"][row]) for row in range(len(table))], dtype=np.int64)
        self.lengths: npt.NDArray[np.int64] = lengths

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row: an array for each column of lists, a number for each other."""
        return {name: column[index] for name, column in self.columns.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the memory map, which each worker process opens itself."""
        return {"_source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Reopen the columns."""
        self._source = state["_source"]
        self._open()


def write_columns(path: Path, batches: Iterable[Mapping[str, Sequence[Any]]]) -> None:
    """Write rows to an Arrow file as they arrive; the first batch defines the types. Without rows no file is written.

    Args:
        path: The file.
        batches: For each column of a batch, one list or number a row.
    """
    writer = None
    for batch in batches:
        table = _table_of(batch, writer.schema if writer else None)
        writer = writer or TableWriter(path, table.schema)
        writer.write(table)
    if writer is not None:
        writer.close()


class TableWriter:
    """Writes tables of one schema to an Arrow file.

    Args:
        path: The file.
        schema: The schema.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        import pyarrow as pa

        self.schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, schema)

    def write(self, table: pa.Table) -> None:
        """Append a table."""
        self._writer.write_table(table.combine_chunks(), max_chunksize=_ROWS_IN_A_BATCH)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
        self._file.close()


def read_table(path: Path) -> pa.Table:
    """Open an Arrow file through a memory map."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Return the record batches of an Arrow file, one after another."""
    import pyarrow as pa

    with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _table_of(columns: Mapping[str, Sequence[Any]], schema: pa.Schema | None = None) -> pa.Table:
    import pyarrow as pa

    arrays = {}
    for name, values in columns.items():
        kind = _kind_of(values)
        settled = schema.field(name).type if schema else kind
        is_fraction = kind in (pa.float32(), pa.list_(pa.float32()))
        assert settled == kind or not is_fraction, f"{name} holds fractions, and began with whole numbers"
        arrays[name] = pa.array(values, settled)
    return pa.table(arrays)


def _kind_of(values: Sequence[Any]) -> pa.DataType:
    import pyarrow as pa

    is_list = not isinstance(values[0], int | float | np.number)
    numbers = next((one for one in values if len(one)), ()) if is_list else values
    first = numbers[0] if len(numbers) else 0
    kind = pa.float32() if isinstance(first, float | np.floating) else pa.int32()
    return pa.list_(kind) if is_list else kind


def _readable(column: pa.ChunkedArray) -> ListColumn | npt.NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_list(column.type):
        return ListColumn(column)
    return np.concatenate([_array_of(chunk) for chunk in column.chunks])


def _array_of(numbers: pa.Array) -> npt.NDArray[Any]:
    """Return an Arrow array of numbers as a view of its memory; its own conversion would import pandas."""
    import pyarrow as pa

    letter = "f" if pa.types.is_floating(numbers.type) else "i"
    kind = np.dtype(f"{letter}{numbers.type.bit_width // 8}")
    buffer = numbers.buffers()[1]
    if buffer is None or not len(numbers):
        return np.zeros(0, kind)
    return np.frombuffer(buffer, kind, count=len(numbers), offset=numbers.offset * kind.itemsize)
