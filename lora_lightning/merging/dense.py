"""Dequantize the base under its adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import (
    adapter_state_dict,
    attached_methods,
    detach,
    iter_adapters,
    load_adapter_state_dict,
)
from lora_lightning.adapters.frozen import trains_statistics
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones.attach import attach
from lora_lightning.backbones.storage.quantized import quantized_modules
from lora_lightning.peft_format.copies import is_copy


@torch.no_grad()
def dequantize(model: nn.Module) -> int:
    """Replace every quantized layer of an adapted model with a dense one; the adapters are unchanged.

    Args:
        model: A model with adapters, changed in place.

    Returns:
        Number of quantized layers.
    """
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    methods = attached_methods(model)
    extra = [method.extra_state(model) for method in methods]
    copies = [path for path, _, adapter in iter_adapters(model) if is_copy(adapter)]
    statistics = trains_statistics(model)
    detach(model)
    layers = list(quantized_modules(model))
    for path, layer in layers:
        model.set_submodule(path, _dense(layer))
    _forget_quantization(model)
    attach(model, methods, modules_to_save=copies, train_norm_statistics=statistics)
    load_adapter_state_dict(model, state)
    for method, one in zip(methods, extra, strict=True):
        method.load_extra_state(model, one)
    return len(layers)


def _dense(layer: Any) -> nn.Module:  # noqa: ANN401 - a layer of bitsandbytes
    """Build the dense layer of a quantized one: a Linear, or a Conv1D if it was one."""
    weight = read_weight(layer)
    num_out, num_in = weight.shape
    source = getattr(layer, "source_cls", None)
    dense: Any
    if source is not None and source.__name__ == "Conv1D":
        dense = source(num_out, num_in)
        weight = weight.t()
    else:
        dense = nn.Linear(num_in, num_out, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    if layer.bias is not None:
        bias: Tensor = layer.bias.detach()
        dense.bias = nn.Parameter(bias.to(weight.dtype).clone(), requires_grad=False)
    dense.train(layer.training)
    assert isinstance(dense, nn.Module)
    return dense


def _forget_quantization(model: Any) -> None:  # noqa: ANN401 - transformers' own attributes
    """Make transformers save the model as any dense one."""
    config = getattr(model, "config", None)
    for one in (config, getattr(config, "get_text_config", lambda: None)()):
        if one is not None and hasattr(one, "quantization_config"):
            del one.quantization_config
    for name, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if hasattr(model, name):
            setattr(model, name, value)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, name):
            setattr(model, name, False)
