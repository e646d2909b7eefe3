"""A small model with adapters of several names, and the same adapters alone on copies of their base."""

from collections.abc import Mapping

import torch
from torch import nn

from lora_lightning.adapters import Method, adapter_state_dict, iter_roles, load_adapter_state_dict
from lora_lightning.backbones.attach import attach
from lora_lightning.methods import IA3, BottleneckAdapter, DoRA, LoRA
from tests.models import build

METHODS: Mapping[str, Method | list[Method]] = {
    "de": LoRA(r=4, target_modules="all-linear", modules_to_save=["classifier"]),
    "fr": LoRA(r=4, target_modules="all-linear"),
    "it": [IA3(), LoRA(r=2, target_modules=["query"])],
    "nl": DoRA(r=2, target_modules=["query", "dense"]),
    "pt": BottleneckAdapter(width=4),
}


def base(architecture: str = "bert") -> nn.Module:
    """Return the bare model, in float64."""
    return build(architecture).double()


def with_names(methods: Mapping[str, Method | list[Method]] = METHODS, architecture: str = "bert") -> nn.Module:
    """Return a model with adapters of several names, whose values all differ."""
    model = base(architecture)
    for seed, (name, method) in enumerate(methods.items()):
        attach(model, method, name=name)
        move(model, name, seed)
    return model.eval()


def alone(model: nn.Module, name: str, architecture: str = "bert") -> nn.Module:
    """Return the bare model with the adapter of one name of `model`, and no other."""
    other = base(architecture)
    attach(other, METHODS[name])
    load_adapter_state_dict(other, adapter_state_dict(model, name))
    return other.eval()


@torch.no_grad()
def move(model: nn.Module, name: str, seed: int) -> None:
    """Move the adapter of one name off its start."""
    generator = torch.Generator().manual_seed(100 + seed)
    for _, parameter, _ in iter_roles(model, name):
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
