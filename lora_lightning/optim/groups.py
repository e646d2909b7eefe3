"""Parameter groups by role."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_lightning.adapters import Role, iter_roles
from lora_lightning.adapters.walk import check_names
from lora_lightning.errors import ConfigError
from lora_lightning.optim.config import EMBEDDING_LR_OF_LORA_PLUS, Optim, dense_alternative

__all__ = ["param_groups"]

_VECTOR_ROLES = (Role.MAGNITUDE, Role.VECTOR, Role.BIAS)
_WITH_FUSED_KERNEL = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def learning_rate(role: Role, optim: Optim) -> float:
    """Return the rate of a role.

    Example:
        >>> learning_rate(Role.B, Optim(lr=1e-4, lora_plus_ratio=16))
        0.0016
    """
    if role is Role.B:
        return optim.lr * (optim.lora_plus_ratio or 1)
    if role is Role.HEAD:
        return optim.head_lr or optim.lr
    if role is Role.EMBEDDING:
        return optim.embedding_lr or (EMBEDDING_LR_OF_LORA_PLUS if optim.lora_plus_ratio else optim.lr)
    return optim.lr


def param_groups(model: nn.Module, optim: Optim, name: str | None = None) -> list[dict[str, Any]]:
    """Group a model's trainable parameters by role, each group with its rate and weight decay.

    Trainable parameters that no adapter owns (a custom task's own layers) count as HEAD. Vectors get no weight decay.

    Args:
        model: A model with adapters, or a module around one.
        optim: The rates.
        name: The name of the adapter whose parameters to take, and nothing else; None for all that is trainable.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name` (the role; `…, no decay` for vectors); none is empty and
        each trainable parameter is in exactly one.

    Raises:
        ConfigError: No adapter has this name, nothing is trainable, something trainable is float16, or LoRA+ is asked
            for and no adapter has a B factor.
    """
    if name is not None:
        check_names(model, [name])
    roles = {id(parameter): role for _, parameter, role in iter_roles(model, name)}
    groups: dict[str, dict[str, Any]] = {}
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad or (name is not None and id(parameter) not in roles):
            continue
        if parameter.dtype is torch.float16:
            raise ConfigError(
                f"The trainable parameter {path!r} is float16, which loses small updates and whose gradients cannot be "
                "scaled; keep what trains in float32 (precision 16-mixed, bf16-mixed or 32-true instead of 16-true)."
            )
        role = roles.get(id(parameter), Role.HEAD)
        decays = optim.weight_decay > 0 and role not in _VECTOR_ROLES and parameter.ndim > 1
        group = role.value if decays or optim.weight_decay == 0 else f"{role.value}, no decay"
        empty = {
            "params": [],
            "lr": learning_rate(role, optim),
            "weight_decay": optim.weight_decay if decays else 0.0,
            "name": group,
        }
        groups.setdefault(group, empty)["params"].append(parameter)
    if not groups:
        raise ConfigError("No parameter is trainable; attach a method first.")
    if optim.lora_plus_ratio and Role.B not in roles.values():
        raise ConfigError("lora_plus_ratio raises the rate of the B factors, and no adapter of this model has one.")
    return list(groups.values())


def build_optimizer(model: nn.Module, optim: Optim, *, may_fuse: bool = True) -> torch.optim.Optimizer:
    """Build the optimizer over the groups of `param_groups`.

    Args:
        model: A model with adapters, or a module that holds one.
        optim: The settings.
        may_fuse: Whether to use torch's fused kernel if it supports the optimizer and the device, and the settings do
            not choose. It updates the adapters of a MiniLM in a sixth of the time, on a CPU too.

    Raises:
        ConfigError: As `param_groups`; or the optimizer cannot run on the model's device.
    """
    cls, arguments = optim.optimizer_class()
    if optim.is_of_bitsandbytes:
        _refuse_unable(cls.__name__, [p for p in model.parameters() if p.requires_grad])
    groups = param_groups(model, optim)
    if may_fuse and _can_fuse(cls, arguments, [parameter for group in groups for parameter in group["params"]]):
        arguments["fused"] = True
    return cls(groups, lr=optim.lr, **arguments)  # type: ignore[call-arg]  # every optimizer has lr


def _can_fuse(cls: type[torch.optim.Optimizer], arguments: dict[str, Any], parameters: list[nn.Parameter]) -> bool:
    """Return whether torch has a fused kernel for an optimizer on its device, and the settings do not choose."""
    chosen = arguments.keys() & {"fused", "foreach", "capturable", "differentiable"}
    devices = {parameter.device.type for parameter in parameters}
    return cls in _WITH_FUSED_KERNEL and not chosen and devices in ({"cpu"}, {"cuda"})


def _refuse_unable(name: str, parameters: list[nn.Parameter]) -> None:
    """Raise ConfigError if an optimizer of bitsandbytes cannot page, or has no kernel for these parameters.

    On a CPU, bitsandbytes would continue without paging, with a warning.
    """
    devices = {parameter.device.type for parameter in parameters}
    if name.startswith("Paged") and "cpu" in devices:
        rest = name.removeprefix("Paged")
        small = f"{rest} to keep its state in 8 bits, or " if rest.endswith("8bit") else ""
        raise ConfigError(
            f"Optim: {name} moves its state between a GPU's memory and the machine's, and this model trains on the "
            f"CPU, where there is nothing to move. Use optimizer={small}{dense_alternative(name)}."
        )
    operator = "bitsandbytes::optimizer_update_8bit_blockwise" if name.endswith("8bit") else None
    if operator and "cpu" in devices and not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU"):
        raise ConfigError(
            f"Optim: {name} of the installed bitsandbytes runs on a GPU only, and this model trains on the CPU. Use "
            f"optimizer={dense_alternative(name)}, or a newer bitsandbytes."
        )
