"""Tensors in temporary files that are mapped into memory, so that the system may write them out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor


class Spool:
    """Keeps tensors in memory-mapped files: they take disk space, and only memory that the system can reclaim.

    Args:
        folder: Folder of the files; a file is deleted together with its tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_written = 0

    def put(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of a tensor in a file.

        Args:
            tensor: The tensor, on the CPU.
            dtype: The dtype of the copy.
        """
        if not tensor.numel():
            return tensor.to(dtype)
        path = self._folder / str(self._num_written)
        self._num_written += 1
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=dtype).view(tensor.shape)
        path.unlink()  # the mapping keeps it for as long as the tensor lives
        return mapped.copy_(tensor)


@contextmanager
def spooling(folder: Path) -> Iterator[Spool]:
    """Open a spool in a temporary folder.

    Args:
        folder: An existing folder on a disk with room for the tensors.
    """
    with TemporaryDirectory(prefix=".spool-", dir=folder) as place:
        yield Spool(Path(place))
