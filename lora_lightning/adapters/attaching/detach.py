"""Take adapters off a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.adapters.calls import end_watch, watch_first_calls
from lora_lightning.adapters.frozen import freeze_norms, release_modes
from lora_lightning.adapters.host import unhang
from lora_lightning.adapters.selection.checkpointing import unfollow_selection
from lora_lightning.adapters.selection.state import whole
from lora_lightning.adapters.walk import (
    RECORD,
    Attachment,
    adapter_names,
    check_names,
    iter_hosts,
    refuse_sharded,
    unwrap,
)
from lora_lightning.adapters.weights import RESERVED

__all__ = ["detach"]


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take adapters off a model; without the last one it is exactly as before `attach`, `requires_grad` included.

    Where the one that acted by default goes, the first of those that stay does.

    Args:
        model: A model with adapters.
        name: The name of the adapter to take off; None for all.

    Raises:
        TargetError: The model is sharded.
        ConfigError: No adapter has this name.
    """
    refuse_sharded(model, "detach")
    if name is not None:
        check_names(model, [name])
        others = [one for one in adapter_names(model) if one != name]
        if others:
            _detach_one(unwrap(model), name)
            return
    _detach_all(unwrap(model))


def _detach_one(model: nn.Module, name: str) -> None:
    """Take off the adapters of one name; others stay, and with them what they need."""
    release_modes(model)
    for _, host in list(iter_hosts(model)):
        stack: Any = host._modules[RESERVED]
        unhang(host, [key for key, adapter in stack.items() if adapter.name == name])
    record: Attachment = model.__dict__[RECORD]
    del record.methods[name]
    left = tuple(whole(one) for one in record.methods)
    acting = record.selector.default
    still = left if acting is None else tuple(entry for entry in acting if entry in left)
    record.selector.act_by_default(still or left[:1])
    freeze_norms(model)
    watch_first_calls(model)


def _detach_all(model: nn.Module) -> None:
    release_modes(model)
    for _, host in list(iter_hosts(model)):
        unhang(host)
    unfollow_selection(model)
    for module in model.modules():  # adapters may have been attached to a part of the model
        record: Attachment | None = module.__dict__.pop(RECORD, None)
        if record is None:
            continue
        end_watch(module)
        if record.unroute is not None:
            record.unroute(module)
        for parameter in record.was_trainable:
            module.get_parameter(parameter).requires_grad_()
        for path in record.nested_encoders:
            module.get_submodule(path).use_nested_tensor = True  # type: ignore[assignment]  # an nn.TransformerEncoder
