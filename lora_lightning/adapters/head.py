"""A trainable full copy beside a frozen module: heads, and whatever `modules_to_save` names."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lora_lightning.adapters.base import ForwardAdapter, Role


class HeadAdapter(ForwardAdapter):
    """A float32 copy of a module that trains in its place.

    The frozen original stays in the model, so `disabled` gives the base model's own output. Floating-point inputs
    are cast to the copy's dtype and its outputs back to the original's, except under autocast, which casts itself.

    Args:
        host: The module to copy.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(host).requires_grad_()
        self.host_dtype = next((p.dtype for p in host.parameters() if p.is_floating_point()), torch.float32)
        if self.host_dtype is not torch.float64:
            self.module.float()

    def role_of(self, name: str) -> Role:
        """Return HEAD: all parameters of the copy belong to a head."""
        del name
        return Role.HEAD

    def public_name(self, name: str) -> str:
        """Return the name of a parameter as the host itself has it."""
        return name.removeprefix("module.")

    def check_mergeable(self, host: nn.Module) -> None:
        """Accept any module: its parameters are simply replaced by the copy's."""
        del host

    def merge_into(self, host: nn.Module) -> None:
        """Write the copy's parameters and buffers into the original, cast to its dtype."""
        own = self.module.state_dict()
        for name, tensor in host.state_dict().items():
            if name in own:  # the rest is this adapter's own, which hangs below the host
                tensor.copy_(own[name])

    def forward(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the host's own signature
        """Call the copy instead of the host."""
        del host
        own_dtype = next((p.dtype for p in self.module.parameters()), self.host_dtype)
        if own_dtype is self.host_dtype or torch.is_autocast_enabled(_device_type(self.module)):
            return self.module(*args, **kwargs)
        args, kwargs = tree_map(lambda value: _cast(value, own_dtype), (args, kwargs))
        return tree_map(lambda value: _cast(value, self.host_dtype), self.module(*args, **kwargs))


def _device_type(module: nn.Module) -> str:
    return next((p.device.type for p in module.parameters()), "cpu")


def _cast(value: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - leaves of any type pass through
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
