"""Fold adapters into the weights of their hosts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn

from lora_lightning.adapters.attaching.detach import detach
from lora_lightning.adapters.base import ForwardAdapter
from lora_lightning.adapters.selection.blocks import active
from lora_lightning.adapters.view import ModelView, PlainView
from lora_lightning.adapters.walk import adapter_names, iter_adapters, iter_hosts, join, only, refuse_sharded
from lora_lightning.errors import PackedHost


@torch.no_grad()
def merge(model: nn.Module, view: ModelView | None = None, *, name: str | Sequence[str] | None = None) -> None:
    """Fold adapters into their hosts' dense weights and take them off; without the last, no trace of them remains.

    The arithmetic is done in float32 (float64 on float64 hosts) with one cast at the end. A host that shares its
    weight with another module (an output layer tied to the embeddings) is untied first. Whether every adapter can
    be merged is checked before the first weight changes.

    Args:
        model: A model with adapters; changed in place.
        view: What to ask of the model; None for a plain torch module.
        name: The name of the adapter to merge, or several, whose updates add up; may be left out where the model has
            one. Adapters of other names stay, on the changed base.

    Raises:
        ConfigError: The model has several adapters and none is named, or several are that do not add up.
        NotMergeable: An adapter cannot be folded, or a host's storage is quantized; the model is unchanged.
        TargetError: The model is sharded.

    Example:
        >>> from lora_lightning.adapters import attach
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
    names = names_to_merge(model, name)
    for one in names:
        with only(model, one):
            check_mergeable(model)
    for one in names:
        with only(model, one):
            _merge_one(model, view)
    view.after_merge()
    for one in names:
        detach(model, one)


def names_to_merge(model: nn.Module, name: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names that are meant, each once.

    Raises:
        ConfigError: The model has several adapters and none is named, there is none of a name, or the updates of
            several do not add up.
    """
    known = adapter_names(model)
    if name is None:
        with only(model, None):  # refuses several
            return known
    with active(model, name):  # refuses what does not add up
        return tuple(dict.fromkeys([name] if isinstance(name, str) else name))


def _merge_one(model: nn.Module, view: ModelView) -> None:
    """Fold all adapters that are looked at, and leave them attached."""
    for path, host in list(iter_hosts(model)):
        for inner in _tied_modules(model, host):
            view.untie(join(path, inner))
    # What changes a host's input or output acts around what computes its forward, whichever was attached first.
    inside_out = sorted(iter_adapters(model), key=lambda found: not isinstance(found[2], ForwardAdapter))
    for _, host, adapter in inside_out:
        adapter.merge_into(host)


def check_mergeable(model: nn.Module) -> None:
    """Raise NotMergeable, with the reason, where one of a model's adapters cannot be folded into its host."""
    for _, host, adapter in iter_adapters(model):
        adapter.check_mergeable(host)


def refuse_unmergeable_kinds(model: nn.Module) -> None:
    """Raise NotMergeable where an adapter cannot be folded, not even into a base that is stored dense."""
    for _, host, adapter in iter_adapters(model):
        with suppress(PackedHost):  # the same adapter on the dense base is another matter
            adapter.check_mergeable(host)


def _tied_modules(model: nn.Module, host: nn.Module) -> list[str]:
    """Return the paths, from `host`, of the modules in it that share a parameter with a module outside it."""
    inside = set(host.modules())
    outside = {id(own) for module in model.modules() if module not in inside for own in module._parameters.values()}
    return [
        name
        for name, module in host.named_modules()
        if any(own is not None and id(own) in outside for own in module._parameters.values())
    ]
