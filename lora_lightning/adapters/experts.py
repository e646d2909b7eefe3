"""The weights of a module that holds many experts: a 3-D parameter for each projection, as transformers lays them out.

transformers' mixtures of experts (Mixtral, Qwen-MoE, DeepSeek, GPT-OSS, …) share one layout, its experts interface: a
module with `gate_up_proj` (or `up_proj` where `has_gate` is false) and `down_proj`, with biases where `has_bias` says
so, and with a gate function of its own, `_apply_gate`. Such a module has no codec, since a codec reads one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.adapters.weights import Host, original_class
from lora_lightning.errors import TargetError

# What transformers' decorator for experts sets on each module, and nothing else has.
_LAYOUT = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

SAME_RESULT = (None, "eager", "batched_mm", "grouped_mm")
"""Implementations of transformers' experts that compute the same up to rounding, so that ours may take their place."""


def expert_weights(host: Host) -> tuple[str, ...]:
    """Return the names of the 3-D parameters of an experts module in the order of their use; nothing for other modules.

    Nothing, too, where the class has another forward than the one that transformers' interface governs, or where the
    experts are stored quantized.
    """
    if not all(hasattr(host, name) for name in _LAYOUT):
        return ()
    if not hasattr(original_class(host).forward, "__wrapped__"):  # an override of the decorated forward
        return ()
    names = ("gate_up_proj" if host.has_gate else "up_proj", "down_proj")
    weights = [host._parameters.get(name) for name in names]
    dense = all(weight is not None and weight.dim() == 3 and weight.dtype in DENSE for weight in weights)
    return names if dense else ()


def read_experts(host: Host, name: str) -> Tensor:
    """Return one projection of all experts, a view of shape `[experts, out, in]`."""
    weight: Tensor = host._parameters[name]
    return weight.transpose(1, 2) if host.is_transposed else weight


def expert_bias(host: Host, name: str) -> Tensor | None:
    """Return the biases of one projection, `[experts, out]`, or None where the experts have none."""
    return getattr(host, f"{name}_bias") if host.has_bias else None


def check_experts(host: Host) -> None:
    """Refuse experts whose forward cannot be taken over.

    Raises:
        TargetError: Another implementation of experts is set than those that compute the same as ours, or the experts
            are spread over several processes.
    """
    name = getattr(host.config, "_experts_implementation", None)
    if name not in SAME_RESULT:
        raise TargetError(
            f"Adapted experts compute what transformers' experts implementations eager, batched_mm and grouped_mm do, "
            f"and this model is set to {name!r}; set one of the three (model.set_experts_implementation('eager')), or "
            "leave the experts out of the targets."
        )
    if getattr(host, "_is_expert_parallel", False):
        raise TargetError(
            "This model's experts are spread over several processes (expert parallelism), and adapters on experts need "
            "all of them in each; load it without, or leave the experts out of the targets."
        )


def by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Sort the pairs of a token and one of its experts by expert.

    Args:
        chosen: The experts of each token, int64 `[tokens, k]`.
        num_experts: How many there are.

    Returns:
        The order, `[tokens * k]` indices into the flattened pairs, and how many pairs each expert has.

    Example:
        >>> by_expert(torch.tensor([[2, 0], [0, 1]]), 4)
        (tensor([1, 2, 3, 0]), [2, 1, 1, 0])
    """
    flat = chosen.flatten()
    counts: list[int] = flat.bincount(minlength=num_experts).tolist()
    return flat.argsort(stable=True), counts
