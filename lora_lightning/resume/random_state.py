"""The random numbers of a process: taken, put back, and kept in a checkpoint as plain types."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of Python's, NumPy's and torch's global generators, and of the device's.

    Args:
        python: What `random.getstate()` returns.
        numpy: What `numpy.random.get_state()` returns.
        cpu: State of torch's CPU generator, bytes.
        device: State of the generator of the process's own CUDA device, bytes; None without one.

    Example:
        >>> state = RandomState.now()
        >>> drawn = torch.rand(2), random.random()
        >>> state.restore()
        >>> torch.equal(drawn[0], torch.rand(2)), drawn[1] == random.random()
        (True, True)
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cpu: Tensor
    device: Tensor | None = None

    @classmethod
    def now(cls, device: torch.device | None = None) -> Self:
        """Take the present state, of a CUDA device too where one is given."""
        numpy_state: Any = np.random.get_state()
        on_device = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
        return cls(random.getstate(), tuple(numpy_state), torch.get_rng_state(), on_device)

    def restore(self, device: torch.device | None = None) -> None:
        """Put the state back; a state without a device's leaves that of the device as it is."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None and device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.device, device)

    def plain(self) -> dict[str, Any]:
        """Return the state as numbers, lists and tensors, which `torch.load(weights_only=True)` reads."""
        version, words, gauss = self.python
        name, keys, position, has_gauss, cached = self.numpy
        return {
            "python": [version, torch.tensor(words), gauss],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
            "cpu": self.cpu,
            "device": self.device,
        }

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> Self:
        """Build a state from what `plain` returned."""
        version, words, gauss = state["python"]
        name, keys, position, has_gauss, cached = state["numpy"]
        device: Tensor | None = state["device"]
        return cls(
            python=(version, tuple(words.tolist()), gauss),
            numpy=(name, keys.numpy().astype(np.uint32), position, has_gauss, cached),
            cpu=state["cpu"].cpu(),
            device=None if device is None else device.cpu(),
        )
