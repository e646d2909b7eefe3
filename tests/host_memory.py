"""What stands in for pinned host memory where there is no GPU: it counts, keeps, and damages on request."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.tasks.offload import OffloadActivations


class Copy:
    """A copy in "host memory"; it may be damaged on the way back."""

    def __init__(self, data: Tensor, damage: int) -> None:
        self.host, self.damage, self.is_complete, self.num_restored = data.clone(), damage, False, 0

    def wait(self) -> None:
        self.is_complete = True

    def restore(self) -> Tensor:
        assert self.is_complete
        self.num_restored += 1
        restored = self.host.clone()
        restored.view(torch.float32).mul_(1 + self.damage)
        return restored


class Store:
    """Takes tensors of bytes, and hands out copies."""

    def __init__(self, damage: int = 0) -> None:
        self.damage = damage
        self.copies: list[Copy] = []

    def __call__(self, data: Tensor) -> Copy:
        self.copies.append(Copy(data, self.damage))
        return self.copies[-1]

    @property
    def sizes(self) -> list[int]:
        return [copy.host.numel() for copy in self.copies]


def offloading(model: nn.Module, store: Store, min_bytes: int = 2048) -> OffloadActivations:
    """Offload from the CPU."""
    return OffloadActivations(model, store=store, is_movable=lambda _: True, min_bytes=min_bytes)
