"""A block in which every adapter must be called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_lightning.adapters.calls.watch import called_adapters, left_out, refuse_idle
from lora_lightning.adapters.selection.blocks import acting_names
from lora_lightning.adapters.walk import iter_adapters, unwrap


@contextmanager
def require_calls(model: nn.Module, *, of_all: bool = True) -> Iterator[None]:
    """Check that every adapter is called at least once inside the `with` block.

    Of adapters of several names, those of the names that acted there; where none did, those that act by default.

    Args:
        model: A model with adapters.
        of_all: False excepts layers that a model in training drops at random (LayerDrop).

    Raises:
        AdapterNotCalled: Some were not; the message names their hosts.
    """
    found = [(path, adapter) for path, _, adapter in iter_adapters(model) if not adapter.may_rest]
    with called_adapters([adapter for _, adapter in found]) as called:
        yield
    names = {adapter.name for _, adapter in found if id(adapter) in called} or set(acting_names(model))
    adapters = [(path, adapter) for path, adapter in found if adapter.name in names]
    idle = [path for path, adapter in adapters if id(adapter) not in called]
    if not of_all:
        excepted = left_out(unwrap(model), idle, {path for path, adapter in adapters if id(adapter) in called})
        idle = [path for path in idle if path not in excepted]
    refuse_idle(idle, len(adapters))
