"""Rows on disk: written as they are read, with statistics about them, and read back one by one."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.data.batches.columns import TableWriter, read_batches, read_table
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.rows.splits import Indices
from lora_lightning.data.sources import Record

_ABOUT = "about.json"
_WRITTEN_TOGETHER = 2000
NO_CLASS = -1


@dataclass
class About:
    """Statistics of the rows that were read.

    Args:
        counts: Number of rows by outcome.
        num_rows: Number of rows of each split.
        labels: For each source, by the split that names it, and each label: the number of its rows and the location of
            the first.
        train_labels: How many rows of `train` have each label.
        parts: How many rows of `train` come from each of its sources; these rows stand in the order of the sources.
        ignored: How many records hold each field that nothing reads.
        places: The files that rows come from, and what their numbers count.
        bad: Records skipped as broken: location and reason, and the text.
        fingerprint: SHA-256 of the rows and their splits.
    """

    counts: dict[str, int] = field(default_factory=dict)
    num_rows: dict[str, int] = field(default_factory=dict)
    labels: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    train_labels: dict[str, int] = field(default_factory=dict)
    parts: list[int] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    fingerprint: str = ""


class Pool:
    """Writes rows to a file; memory holds only what splitting needs, about 30 bytes a row.

    Args:
        path: The file.
        about: Records the labels and the files.
        split: The split that names the source.
    """

    def __init__(self, path: Path, about: About, split: str) -> None:
        import pyarrow as pa

        kinds = {"content": pa.string(), "place": pa.int32(), "number": pa.int64()}
        self._writer = TableWriter(path, pa.schema(list(kinds.items())))
        self.about, self._labels = about, about.labels.setdefault(split, {})
        self._ends: list[int] = []  # of each source that was read
        self._places = {place: index for index, place in enumerate(about.places)}
        self._waiting: list[tuple[str, int, int]] = []
        self._class_of: dict[str, int] = {}
        self.path = path
        self.copies, self.groups, self.classes = array("Q"), array("Q"), array("i")
        self._codes, self._num_codes = array("i"), array("i")  # of all labels, and how many each row has

    def add(self, row: Row, record: Record) -> None:
        """Add a row."""
        content = json.dumps(row.content, sort_keys=True)
        place = self._places.setdefault((record.source, record.unit), len(self._places))
        self._waiting.append((content, place, record.number))
        self.copies.append(_digest(content))
        self.groups.append(_digest(row.group))
        for label in row.labels:
            count, first = self._labels.get(label, (0, record.place))
            self._labels[label] = (count + 1, first)
        codes = [self._class_of.setdefault(label, len(self._class_of)) for label in row.labels]
        self.classes.append(codes[0] if len(codes) == 1 else NO_CLASS)
        self._codes.extend(codes)
        self._num_codes.append(len(codes))
        if len(self._waiting) == _WRITTEN_TOGETHER:
            self._write()

    def close(self) -> None:
        """Write buffered rows, and finish the file."""
        self._write()
        self._writer.close()
        self.about.places = list(self._places)

    def end_source(self) -> None:
        """Note that all rows of a source are taken."""
        self._ends.append(len(self.copies))

    def count_sources(self, rows: Indices) -> list[int]:
        """Return how many of some rows come from each source, in the order in which these were read."""
        source_of = np.searchsorted(self._ends, rows, side="right")
        return np.bincount(source_of, minlength=len(self._ends)).tolist()

    def class_names(self) -> list[str]:
        """Return the names of the classes by their index."""
        return list(self._class_of)

    def arrays(self) -> tuple[Indices, Indices, Indices]:
        """Return for each row a number that copies share, one that its group shares, and its class."""
        copies, groups = (np.frombuffer(one, dtype=np.uint64) for one in (self.copies, self.groups))
        return copies, groups, np.frombuffer(self.classes, dtype=np.int32)  # type: ignore[return-value]  # any integers

    def count_labels(self, rows: Indices) -> dict[str, int]:
        """Return how many of some rows have each label; labels of none of them are left out."""
        is_counted = np.zeros(len(self.copies), dtype=bool)
        is_counted[rows] = True
        codes = np.array(self._codes, dtype=np.int32)[np.repeat(is_counted, self._num_codes)]
        num_rows_of = np.bincount(codes, minlength=len(self._class_of)).tolist()
        return {name: count for name, count in zip(self._class_of, num_rows_of, strict=True) if count}

    def _write(self) -> None:
        import pyarrow as pa

        if self._waiting:
            columns = zip(*self._waiting, strict=True)
            arrays = [pa.array(c, kind.type) for c, kind in zip(columns, self._writer.schema, strict=True)]
            self._writer.write(pa.Table.from_arrays(arrays, schema=self._writer.schema))
            self._waiting.clear()


def fingerprint(folder: Path, splits: Mapping[str, int], names: Sequence[str] | None = None) -> str:
    """Return the SHA-256 of rows, the splits they are in, and the label names, as 64 hexadecimal digits.

    Args:
        folder: Where `lay` wrote the rows.
        splits: The splits; rows to predict do not count.
        names: The label names, where there are some.
    """
    digest = hashlib.sha256(b"" if names is None else json.dumps(list(names)).encode())
    for split in sorted(splits):
        if kind_of(split) != "predict":
            opening = f"[{json.dumps(split)}, "
            for content in contents(folder, split):
                digest.update((opening + content[1:]).encode())
    return digest.hexdigest()


def contents(folder: Path, split: str) -> Iterator[str]:
    """Return the contents of a split's rows, as JSON."""
    for batch in read_batches(split_file(folder, split)):
        yield from batch["content"].to_pylist()


def kind_of(split: str) -> str:
    """Return what the rows of a split are for.

    Example:
        >>> kind_of("val/reviews"), kind_of("train")
        ('val', 'train')
    """
    return split.split("/")[0]


def split_file(folder: Path, split: str) -> Path:
    """Return the file of a split's rows."""
    return folder / f"{split.replace('/', '.')}.arrow"


def save_about(about: About, folder: Path) -> None:
    """Write the statistics of rows into their folder, and the broken records into a separate file."""
    text = json.dumps(vars(about))
    (folder / _ABOUT).write_text(text, "utf-8")


def load_about(folder: Path) -> About:
    """Read what `save_about` wrote."""
    return About(**json.loads((folder / _ABOUT).read_text("utf-8")))


class SplitRows:
    """The rows of a split, read from their file when they are asked for.

    Args:
        folder: Where `lay` wrote them.
        split: The split.
        about: What `lay` returned.
    """

    def __init__(self, folder: Path, split: str, about: About) -> None:
        self._folder, self.split, self._about = folder, split, about
        self._table: Any = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._about.num_rows[self.split]

    def __iter__(self) -> Iterator[list[Any]]:
        """Return each row's content."""
        return map(json.loads, contents(self._folder, self.split))

    def batches(self) -> Iterator[tuple[int, list[StoredRow]]]:
        """Return the rows some thousand at a time, with the index of the first."""
        start = 0
        for batch in read_batches(split_file(self._folder, self.split)):
            places = [self._about.places[index] for index in batch["place"].to_pylist()]
            numbers = batch["number"].to_pylist()
            named = [f"{source}, {unit} {number}" for (source, unit), number in zip(places, numbers, strict=True)]
            contents_here = map(json.loads, batch["content"].to_pylist())
            yield start, [StoredRow(*row) for row in zip(contents_here, named, strict=True)]
            start += len(batch)

    def content(self, index: int) -> list[Any]:
        """Return one row's content."""
        return json.loads(self._cell("content", index))

    def place(self, index: int) -> tuple[str, str, int]:
        """Return the file that a row comes from, what is counted in it, and its number."""
        source, unit = self._about.places[self._cell("place", index)]
        return source, unit, self._cell("number", index)

    def _cell(self, column: str, index: int) -> Any:  # noqa: ANN401 - a text or a number
        if self._table is None:
            self._table = read_table(split_file(self._folder, self.split))
        return self._table[column][index].as_py()


def _digest(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
