"""Batches of texts of similar length: sampling order and padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from lora_lightning.data.batches.mixing import Mixture
from lora_lightning.data.batches.packing import UNSUPERVISED
from lora_lightning.resume.position import Layout, Position

# Number of batches that are sorted by length together; a larger value reduces both padding and shuffling.
_BATCHES_SORTED_TOGETHER = 50


_Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class PadToLongest:
    """Makes a batch: pads each text to the longest one in the batch.

    Args:
        padding: What each of the tokenizer's outputs is padded with; outputs not named here get 0, labels of tokens
            -100.
        side: `right` or `left`, where the padding goes.

    Example:
        >>> batch = PadToLongest({"input_ids": 9})([{"input_ids": [1, 2]}, {"input_ids": [3]}])
        >>> batch["input_ids"].tolist()
        [[1, 2], [3, 9]]
    """

    padding: Mapping[str, int] = field(default_factory=dict)
    side: str = "right"

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the tensors of a batch.

        Numbers give `[batch]`, lists `[batch, the longest]`, beside `input_ids` their `attention_mask`.
        """
        batch = {}
        for name in items[0]:
            values = [item[name] for item in items]
            is_list = isinstance(values[0], list | np.ndarray)
            batch[name] = self._padded(name, values) if is_list else torch.from_numpy(_of_kind(np.asarray(values)))
        if "input_ids" in items[0] and "attention_mask" not in items[0]:
            ones = [np.ones(len(item["input_ids"]), np.int64) for item in items]
            batch["attention_mask"] = self._padded("attention_mask", ones)
        return batch

    def _padded(self, name: str, values: Sequence[Any]) -> Tensor:
        width = max(map(len, values))
        fill = self.padding.get(name, UNSUPERVISED if name == "labels" else 0)
        arrays = [_of_kind(np.asarray(value)) for value in values]
        padded = np.full((len(arrays), width), fill, dtype=arrays[0].dtype)
        for row, array in zip(padded, arrays, strict=True):
            start = 0 if self.side == "right" else width - len(array)
            row[start : start + len(array)] = array
        return torch.from_numpy(padded)


def _of_kind(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return numbers in the type that models take: whole ones as int64, others as float32."""
    is_fraction = np.issubdtype(values.dtype, np.floating) and values.size > 0
    return values.astype(np.float32 if is_fraction else np.int64)


class LengthGroupedSampler(DistributedSampler[Any]):
    """Orders rows so that the rows of a batch have similar lengths.

    The order depends only on the seed and the epoch. The sampler shuffles the rows, sorts them by length within a few
    dozen batches, and shuffles the batches; an incomplete batch stays last. With several ranks, it builds batches
    `num_replicas` times as large and assigns their rows to the ranks in turn: together the ranks see the batches of one
    process with the larger batch size, with texts of similar length at the same time. Each row goes to one rank, and
    every rank gets the same number of batches. If that is impossible, fewer than `num_replicas` rows are repeated.

    It derives from torch's DistributedSampler, so that Lightning does not shard it again. The loader must have the same
    batch size.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Rows in a batch, on each rank.
        seed: Seed of the order, at least 0.
        shuffle: False gives the same order in every epoch: the longest first, or that of the rows.
        group_by_length: False shuffles without regard to length.
        num_replicas: Number of ranks.
        rank: This process's rank.
        mixture: Draws the rows of each epoch by weight; None takes each row once.

    Example:
        >>> sampler = LengthGroupedSampler([5, 1, 5, 1], batch_size=2, shuffle=False)
        >>> list(sampler)
        [0, 2, 1, 3]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        group_by_length: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        mixture: Mixture | None = None,
    ) -> None:
        super().__init__(range(len(lengths)), num_replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]  # any sized sequence does
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.mixture = mixture
        self.seek(Position())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; the position within another epoch is discarded."""
        if epoch != self.epoch:
            self.seek(Position(epoch))

    def seek(self, position: Position) -> None:
        """Move to a position: the next iteration skips the rows that have passed.

        They may have been divided among another number of ranks. The remaining rows then keep their order and are
        divided among the present ranks like a whole epoch.
        """
        self.epoch = position.epoch
        self._passed = Position(position.epoch)
        for num_batches, layout in position.passed:
            self._passed = self._passed.after(num_batches, layout._replace(num_workers=1))
        self.num_batches_passed = position.num_batches
        self.num_samples = len(self._dealt(np.arange(len(self.lengths))))
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Return the indices of this rank's rows in this epoch, from the present position on."""
        return iter(self._dealt(self._order()).tolist())

    def _dealt(self, order: _Places) -> _Places:
        """Return this rank's share of the remaining order."""
        here, left, start = Layout(self.num_replicas, self.batch_size), order, 0
        for num_batches, layout in self._passed.passed:
            left = left[start:]
            start = num_batches * layout.batch_size * layout.num_replicas
        if not self._passed.passed or self._passed.passed[-1].layout != here:
            left, start = left[start:], 0
        self.num_repeated = _num_repeated(len(left), self.num_replicas, self.batch_size)
        repeated = np.resize(left, self.num_repeated)
        return np.concatenate([left, repeated])[start + self.rank :: self.num_replicas]

    def _order(self) -> _Places:
        """Return the order of all rows, over all ranks, as it was when the epoch began."""
        places = np.arange(len(self.lengths))
        if not self.shuffle:
            return np.argsort(-self.lengths, kind="stable") if self.group_by_length else places
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.mixture is not None:
            places = self.mixture.draw(generator)
        places = generator.permutation(places)
        if not self.group_by_length:
            return places
        first = self._passed.passed[0].layout if self._passed.passed else Layout(self.num_replicas, self.batch_size)
        together = first.batch_size * first.num_replicas
        num_full = len(places) // together
        full, last = np.split(places, [num_full * together])
        # A small data set is sorted in at least four parts; otherwise every epoch would have the same batches.
        part = together * max(min(num_full // 4, _BATCHES_SORTED_TOGETHER), 1)
        parts = [full[start : start + part] for start in range(0, len(full), part)]
        by_length = [one[np.argsort(-self.lengths[one], kind="stable")] for one in (*parts, last)]
        batches = np.concatenate([*by_length[:-1], full[:0]]).reshape(num_full, together)
        return np.concatenate([generator.permutation(batches).reshape(-1), by_length[-1]])


class WholeBatchSampler(DistributedSampler[Any]):
    """Assigns the rows to ranks in order and in whole batches, so that the batches are those of a single process.

    A rank without a batch gets the first batch again; with `is_even`, so does each rank that has one batch less than
    others. The predictions for that batch are then computed twice.

    Args:
        num_rows: Number of rows, at least 1.
        batch_size: Rows in a batch; a loader of the same batch size must cut it.
        num_replicas: Number of ranks.
        rank: This process's rank.
        is_even: Whether all ranks get the same number of batches.

    Example:
        >>> list(WholeBatchSampler(5, batch_size=2, num_replicas=2, rank=0))
        [0, 1, 4]
        >>> list(WholeBatchSampler(5, batch_size=2, num_replicas=2, rank=1, is_even=True))
        [2, 3, 0, 1]
    """

    def __init__(
        self, num_rows: int, batch_size: int, num_replicas: int = 1, rank: int = 0, *, is_even: bool = False
    ) -> None:
        super().__init__(range(num_rows), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]  # any sized sequence does
        batches = [np.arange(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)]
        mine = batches[rank::num_replicas]
        if not mine or (is_even and len(mine) < len(batches[::num_replicas])):
            mine.append(batches[0])
        self._rows = np.concatenate(mine)

    def __len__(self) -> int:
        """Return the number of rows of this rank."""
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        """Return the indices of this rank's rows."""
        return iter(self._rows.tolist())


def even_batch_size(num_rows: int, num_replicas: int, batch_size: int) -> int:
    """Return the largest batch size, up to a given one, for which all ranks have equally many batches without repeats.

    Evaluation uses it: there the batch size does not change the result, but a repeated row would. If there is no such
    size (few rows and a small batch), return the given one.

    Example:
        >>> even_batch_size(13, num_replicas=2, batch_size=6), even_batch_size(13, num_replicas=1, batch_size=6)
        (5, 6)
    """
    sizes = range(batch_size, 0, -1)
    return next((size for size in sizes if not _num_repeated(num_rows, num_replicas, size)), batch_size)


def _num_repeated(num_rows: int, num_replicas: int, batch_size: int) -> int:
    """Return the number of rows to repeat so that all ranks have equally many batches."""
    each, left = divmod(num_rows, num_replicas)
    return num_replicas - left if left and each % batch_size == 0 else 0
