"""Data loaders that leave the global random numbers alone and can start anywhere in an epoch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import DataLoader

from lora_lightning.data.batches.batching import LengthGroupedSampler
from lora_lightning.resume.position import Layout, Position


class RowLoader(DataLoader[Any]):
    """A loader of rows that a `LengthGroupedSampler` orders; see `SeekableLoader`."""

    @property
    def layout(self) -> Layout:
        """How it shares out the rows."""
        return Layout(getattr(self.sampler, "num_replicas", 1), self.batch_size or 1, max(self.num_workers, 1))

    def seekable(self) -> bool:
        """Tell whether the order is the sampler's own; Lightning takes it away to overfit some batches."""
        return isinstance(self.sampler, LengthGroupedSampler)

    def seek(self, position: Position) -> None:
        """Let the next iteration begin at a position."""
        sampler: Any = self.sampler
        sampler.seek(position)

    def __len__(self) -> int:
        """Return the number of batches of the epoch, with those that have passed."""
        if not isinstance(self.sampler, LengthGroupedSampler):
            return super().__len__()
        return self.sampler.num_batches_passed + math.ceil(len(self.sampler) / (self.batch_size or 1))


def own_generator(seed: int) -> torch.Generator:
    """Return a generator for a loader, which would draw the seed of its workers from the global one otherwise.

    A run's dropout then depends neither on how often data are loaded nor on how often it is validated.
    """
    return torch.Generator().manual_seed(seed)
