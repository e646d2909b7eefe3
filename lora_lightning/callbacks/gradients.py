"""Checks of parameters and gradients for the guards, with few operations and without synchronizing with the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_lightning.adapters import Role, iter_roles
from lora_lightning.backbones.defaults import ATTENTION_KEYS
from lora_lightning.callbacks.places import adapted_model

if TYPE_CHECKING:
    import lightning as L

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def optimized(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def largest(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the largest absolute value in each tensor, NaN where there is one, as scalars on their device.

    It is one fused operation. Tensors without a part on this rank are skipped.

    Example:
        >>> largest([torch.tensor([1.0, -3.0]), torch.empty(0)])
        [tensor(3.)]
    """
    parts = [part for part in map(local, tensors) if part.numel()]
    return list(torch._foreach_norm(parts, float("inf"))) if parts else []


def finite_flag(values: Sequence[Tensor]) -> Tensor:
    """Return 0 where all scalars are finite, else NaN: a float32 scalar on the device of the first.

    Example:
        >>> finite_flag([torch.tensor(3.0), torch.tensor(-1e38)]), finite_flag([torch.tensor(float("-inf"))])
        (tensor(0.), tensor(nan))
    """
    return torch.stack([value.to(values[0].device) for value in values]).float().mul_(0).sum()


def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a floating-point tensor's bit patterns (int64 scalar); it changes where any element does.

    Example:
        >>> x = torch.ones(3)
        >>> bool(bit_sum(x) == bit_sum(x.clone())), bool(bit_sum(x) == bit_sum(x + 1e-7))
        (True, False)
    """
    part = local(tensor.detach()).contiguous()
    return part.view(_BITS[part.element_size()]).sum(dtype=torch.int64)


def over_ranks(trainer: L.Trainer, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> Tensor:
    """Reduce a tensor over all ranks, in place; with one rank it is unchanged.

    Lightning's `strategy.reduce` adds a barrier, which would cost time in every step.
    """
    if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, op=op)
    return value


def names_of(module: L.LightningModule) -> dict[int, str]:
    """Return the name of each parameter of a LightningModule by its `id`, as `adapter_state_dict` writes it."""
    model = adapted_model(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if model is not None:
        names.update({id(parameter): name for name, parameter, _ in iter_roles(model)})
    return names


def quoted(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names in quotes, and how many more there are.

    Example:
        >>> quoted(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more"
    """
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + rest


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return name and tensor of every trained adapter parameter whose gradient is not zero by construction.

    A shift of all attention keys cancels in the softmax, so that the gradient of their bias is only rounding.
    """
    return [
        (name, parameter)
        for name, parameter, role in iter_roles(model)
        if parameter.requires_grad and not (role is Role.BIAS and _host(name) in ATTENTION_KEYS)
    ]


def _host(name: str) -> str:
    """Return the last part of the path of the host that a parameter's name begins with."""
    return name.rpartition(".")[0].rpartition(".")[2]
