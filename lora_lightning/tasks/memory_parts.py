"""Lines of a memory plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lora_lightning.adapters.weights import RESERVED

WIDE = 4
"""Bytes of a float32."""


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """One line of a plan.

    Args:
        name: Purpose of the memory.
        num_bytes: Bytes on each device, or in host memory for each device.
        how: What was counted or assumed.
        per_sample: Whether it grows with the batch.
        on_host: Whether it is in host memory.
    """

    name: str
    num_bytes: int
    how: str
    per_sample: bool = False
    on_host: bool = False


def base_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the modules of a model that belong to no adapter."""
    return (module for path, module in model.named_modules() if RESERVED not in path.split("."))


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers that a module holds itself."""
    own = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in own if tensor is not None]


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()
