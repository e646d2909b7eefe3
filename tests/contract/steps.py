"""Adapted models, a training step on them, and the same model in 4 bits."""

import copy
import dataclasses
import re

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from lora_lightning.adapters import Method, iter_roles
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones.attach import attach
from lora_lightning.methods import DeltaLoRA
from tests import models
from tests.contract.examples import Example


def adapted(model: nn.Module, method: Method) -> nn.Module:
    """Return the model with perturbed adapters: nothing is zero, so every part shows in the output."""
    attach(model, method)
    return models.perturb(model)


def with_dropout(method: Method) -> Method:
    """Return the same method with dropout, where it has any."""
    return dataclasses.replace(method, dropout=0.25) if takes_dropout(method) else method


def takes_dropout(method: Method) -> bool:
    """Tell whether a method has dropout; Delta-LoRA has the setting and refuses it."""
    return hasattr(method, "dropout") and not isinstance(method, DeltaLoRA)


def step(model: nn.Module, compiled: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the adapter gradients of one backward pass, through a compiled form of the model if given."""
    model.zero_grad()
    models.logits(model if compiled is None else compiled, models.inputs(model)).float().square().mean().backward()
    return {name: parameter.grad for name, parameter, _ in iter_roles(model) if parameter.requires_grad}


def has_no_gradient(name: str, example: Example) -> bool:
    """Tell whether the gradient of the parameter called `name` is zero by nature, so nothing but rounding."""
    return example.without_gradient is not None and re.fullmatch(example.without_gradient, name) is not None


def largest_gap(actual: dict[str, Tensor], reference: dict[str, Tensor], example: Example) -> float:
    """Return the largest gap between gradients, without those that are zero by nature."""
    names = [name for name in reference if not has_no_gradient(name, example)]
    return max(models.gap(actual[name], reference[name]) for name in names)


def quantize(model: nn.Module) -> nn.Module:
    """Store every linear layer but the head in 4 bits: nf4, double quantization."""
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path in ("lm_head", "classifier"):
            continue
        packed = Linear4bit(module.in_features, module.out_features, module.bias is not None, torch.float32)
        packed.weight = Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
        packed.bias = module.bias
        # Some CPUs repack the weight in the first evaluation, after which bitsandbytes can neither train nor read it;
        # whoever loads a 4-bit model for training turns that off.
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(path, packed.to("cpu"))
    return model.eval()


def dequantized(model: nn.Module) -> nn.Module:
    """Return a copy of a 4-bit model with the same weights stored dense."""
    dense = copy.deepcopy(model)
    for path, module in list(dense.named_modules()):
        if isinstance(module, Linear4bit):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data = read_weight(module).float()
            linear.bias = module.bias
            dense.set_submodule(path, linear)
    return dense.eval()
