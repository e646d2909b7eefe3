"""Sampled values of each weight, which identify a base model; of a quantized weight, the values before quantization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.adapters.experts import expert_weights
from lora_lightning.adapters.weights import Host, codec_of, read_weight

SAMPLES = 1024
_KEPT = "_dense_sample"


def sample(weight: Tensor) -> Tensor:
    """Pick up to 1,024 evenly strided values of a weight, in row order and without copying the rest.

    Args:
        weight: Any floating-point tensor of two dimensions, shape `[out, in]`, contiguous or not.

    Returns:
        The values as float32 on the CPU, shape `[min(1024, out * in)]`; the first and the last are always among them.

    Example:
        >>> sample(torch.arange(6.0).reshape(2, 3))
        tensor([0., 1., 2., 3., 4., 5.])
    """
    columns = weight.shape[1]
    positions = sample_positions(weight.numel()).to(weight.device)
    return weight.detach()[positions // columns, positions % columns].float().cpu()


def sample_positions(total: int) -> Tensor:
    """Return which values of a weight `sample` picks, in row order.

    Args:
        total: How many it has.

    Example:
        >>> sample_positions(3)
        tensor([0, 1, 2])
    """
    count = min(SAMPLES, total)
    return torch.arange(count) * (total - 1) // max(count - 1, 1)


def keep_sample(module: nn.Module, values: Tensor) -> None:
    """Keep with a quantized module what `sample` gave for its weight before it was quantized."""
    setattr(module, _KEPT, values)  # neither a parameter nor a buffer: it is no part of the model's state


def host_sample(host: nn.Module) -> tuple[Tensor, bool]:
    """Return the sample of a host's weight, and whether its values are those of the files.

    They are unless the host is quantized and nothing was kept when it was loaded (somebody else loaded it, or its
    files are quantized already); then they are the values that the quantized weight stands for.
    """
    kept: Tensor | None = getattr(host, _KEPT, None)
    if kept is not None:
        return kept, True
    return sample(read_weight(host)), codec_of(host).write is not None


def host_samples(host: Host) -> dict[str, tuple[tuple[int, ...], Tensor, bool]]:
    """Return shape, sample and `are_original` (see `host_sample`) of every weight of a host.

    By the names of the parameters of an experts module, `[experts, ...]` as they are stored; any other host has one
    weight, `[out, in]`, under an empty name.
    """
    stacked = {name: host._parameters[name] for name in expert_weights(host)}
    if stacked:
        return {name: (tuple(weight.shape), sample(weight.flatten(0, 1)), True) for name, weight in stacked.items()}
    return {"": (tuple(codec_of(host).shape(host)), *host_sample(host))}
