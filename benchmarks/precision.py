"""The base's device and precision, the same for every contender."""

from __future__ import annotations

import torch
from torch import nn


def prepare(model: nn.Module, *, device: torch.device, dtype: torch.dtype, four_bit: bool) -> nn.Module:
    """Move a fresh model to its device and precision, and store the linear layers of its blocks in NF4 where asked.

    Args:
        model: The model; changed in place.
        device: Where it goes.
        dtype: Precision of its weights, and of the products of 4-bit layers.
        four_bit: Whether to quantize.
    """
    model = model.to(dtype)
    if four_bit:
        for module in [*model.modules()]:
            for name, child in [*module.named_children()]:
                if type(child) is nn.Linear and name != "lm_head":
                    setattr(module, name, _quantizable(child, dtype))
    return model.to(device)


def _quantizable(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return a 4-bit layer of the same weight, which is quantized when it is moved to its device."""
    import bitsandbytes as bnb

    packed = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4", compress_statistics=True
    )
    packed.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
    )
    packed.bias = layer.bias
    return packed
