"""Fold adapters into the weights of their hosts."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from lora_lightning.adapters.attach import detach, iter_adapters, iter_hosts, refuse_sharded
from lora_lightning.adapters.view import ModelView, PlainView


@torch.no_grad()
def merge(model: nn.Module, view: ModelView | None = None) -> None:
    """Fold every adapter into its host's dense weight and remove all traces of the adapters.

    The arithmetic is done in float32 (float64 on float64 hosts) with one cast at the end. A host that shares its
    weight with another module (an output layer tied to the embeddings) is untied first. Whether every adapter can
    be merged is checked before the first weight changes.

    Args:
        model: A model with adapters; changed in place.
        view: What to ask of the model; None for a plain torch module.

    Raises:
        NotMergeable: An adapter cannot be folded, or a host's storage is quantized; the model is unchanged.
        TargetError: The model is sharded.

    Example:
        >>> from lora_lightning.adapters.attach import attach
        >>> from lora_lightning.methods import LoRA
        >>> model = nn.Sequential(nn.Linear(8, 2))
        >>> _ = attach(model, LoRA(r=2))
        >>> merge(model)
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    refuse_sharded(model, "merge")
    view = view or PlainView(model)
    for _, host, adapter in iter_adapters(model):
        adapter.check_mergeable(host)
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for path, host in list(iter_hosts(model)):
        if any(holders[id(parameter)] > 1 for parameter in host._parameters.values() if parameter is not None):
            view.untie(path)
    for _, host, adapter in list(iter_adapters(model)):
        adapter.merge_into(host)
    detach(model)
