"""A trainable full copy beside a frozen module: heads, and whatever `modules_to_save` names."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lora_lightning.adapters.base import ForwardAdapter, Role
from lora_lightning.errors import TargetError


class HeadAdapter(ForwardAdapter):
    """A float32 copy of a module that trains in its place.

    The frozen original stays in the model, so `disabled` gives the base model's own output. Floating-point inputs
    are cast to the copy's dtype, except under autocast, which casts them itself; what the copy returns in its own dtype
    is cast to the original's, which the layers behind it take.

    Args:
        host: The module to copy.

    Raises:
        TargetError: The module stores a parameter quantized.
    """

    takes_names: ClassVar[bool] = True

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        packed = [name for name, parameter in host.named_parameters() if _is_packed(parameter)]
        if packed:
            raise TargetError(
                f"A copy of this {type(host).__name__} cannot train, since {packed[0]!r} is stored quantized; take it "
                "out of modules_to_save, or load it in full precision."
            )
        self.module = copied(host).requires_grad_()
        if _dtype(host) is not torch.float64:
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
        own_dtype, host_dtype = _dtype(self.module), _dtype(host)
        if own_dtype is host_dtype:
            return self.module(*args, **kwargs)
        if _is_autocast_on(self.module):
            output = self.module(*args, **kwargs)  # embeddings and some norms keep their own dtype
            return tree_map(lambda value: _cast(value, host_dtype) if _is_of(value, own_dtype) else value, output)
        args, kwargs = tree_map(lambda value: _cast(value, own_dtype), (args, kwargs))
        return tree_map(lambda value: _cast(value, host_dtype), self.module(*args, **kwargs))


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a module, which may have been called with gradients before.

    `copy.deepcopy` refuses tensors with a history, and some modules keep one after a call: the weights that
    `nn.utils.weight_norm` and `nn.utils.spectral_norm` compute, and running values that were not detached. The copy
    gets their values.

    Args:
        module: The module.
        memo: What not to copy, by `id`, as `copy.deepcopy` takes it.

    Example:
        >>> module = nn.utils.spectral_norm(nn.Linear(2, 2))
        >>> _ = module(torch.ones(1, 2))
        >>> module.weight.requires_grad, copied(module).weight.requires_grad
        (True, False)
    """
    memo = {} if memo is None else memo
    for inner in module.modules():
        for value in tree_leaves(vars(inner)):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def _is_packed(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter's elements are not weights but packed bits, which may be stored as any dtype."""
    return not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _is_autocast_on(module: nn.Module) -> bool:
    device = next((p.device.type for p in module.parameters()), "cpu")
    return device != "meta" and torch.is_autocast_enabled(device)


def _is_of(value: Any, dtype: torch.dtype) -> bool:  # noqa: ANN401 - leaves of any type
    return isinstance(value, torch.Tensor) and value.dtype is dtype


def _cast(value: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - leaves of any type pass through
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
