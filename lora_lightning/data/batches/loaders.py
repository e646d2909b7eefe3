"""Data loaders that do not use the global random state and can start at any position in an epoch."""

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
        """How the rows are divided among ranks."""
        return Layout(getattr(self.sampler, "num_replicas", 1), self.batch_size or 1, max(self.num_workers, 1))

    def seekable(self) -> bool:
        """Return whether the sampler decides the order; Lightning replaces it for `overfit_batches`."""
        return isinstance(self.sampler, LengthGroupedSampler)

    def seek(self, position: Position) -> None:
        """Let the next iteration begin at a position."""
        sampler: Any = self.sampler
        sampler.seek(position)

    def __len__(self) -> int:
        """Return the number of batches of the epoch, including those that have passed."""
        if not isinstance(self.sampler, LengthGroupedSampler):
            return super().__len__()
        return self.sampler.num_batches_passed + math.ceil(len(self.sampler) / (self.batch_size or 1))


def own_generator(seed: int) -> torch.Generator:
    """Return a generator for a loader, which would draw the seed of its workers from the global one otherwise.

    The dropout of a run then does not depend on how often data are loaded or validated.
    """
    return torch.Generator().manual_seed(seed)
