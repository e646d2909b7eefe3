"""Predictions of each rank in a separate file, and their merge in the order of the input."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np


class Part:
    """The predictions of one rank, written as they arrive.

    The key of a prediction is the index of its row. If a loader does not provide indices, the key is the index of the
    batch; the batches of the ranks then follow each other in turn.

    Args:
        path: The file; an existing file is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="ascii")

    def add(self, key: int, position: int, prediction: Any) -> None:  # noqa: ANN401 - plain data of any shape
        """Append a prediction.

        Args:
            key: The index of its row, or of its batch.
            position: Its position in the batch, if the key is that of a batch.
            prediction: The prediction, in plain types.
        """
        self._file.write(f"[{key}, {position}, {json.dumps(prediction)}]\n")

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def in_order(paths: Sequence[Path], *, are_indices: bool) -> Iterator[tuple[int, Any]]:
    """Return the predictions of all ranks in the order of their rows, each row once; memory holds 20 bytes a row.

    Args:
        paths: The parts of all ranks.
        are_indices: Whether the keys are indices of rows; otherwise rows are numbered in order of arrival.

    Returns:
        Index of each row, and its prediction.
    """
    keys, positions, ranks, offsets = _scanned(paths)
    order = np.lexsort((positions, ranks, keys))
    if are_indices:
        sorted_keys = keys[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = sorted_keys[1:] != sorted_keys[:-1]
        order = order[is_first]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        for number, place in enumerate(order.tolist()):
            file = files[ranks[place]]
            file.seek(offsets[place])
            key, _, prediction = json.loads(file.readline())
            yield (key if are_indices else number), prediction


def _scanned(paths: Sequence[Path]) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the key, the position in the batch, the rank and the offset of each line."""
    keys, positions, ranks, offsets = array("q"), array("i"), array("i"), array("q")
    for rank, path in enumerate(paths):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                key, position, _ = line[1:].split(b",", 2)
                keys.append(int(key))
                positions.append(int(position))
                ranks.append(rank)
                offsets.append(offset)
                offset += len(line)
    kinds = (np.int64, np.int32, np.int32, np.int64)
    columns = (keys, positions, ranks, offsets)
    return tuple(np.frombuffer(column, kind) for column, kind in zip(columns, kinds, strict=True))
