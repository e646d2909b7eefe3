"""Blocks in which a model acts as its base, or with the adapters of some of its methods alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lora_lightning.adapters.base import Adapter, Method
from lora_lightning.adapters.host import AdapterStack
from lora_lightning.adapters.selection.state import NONE, Choice, Names, Selector, choosing
from lora_lightning.adapters.walk import COPIES, adapters_of, iter_hosts
from lora_lightning.adapters.weights import RESERVED

__all__ = ["disabled"]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Make a model act as its base inside the `with` block, heads and saved modules included.

    This holds for the thread or asyncio task that enters the block, and for no other: blocks may overlap, and other
    threads may use the model's adapters meanwhile. A thread that is started inside the block does not inherit it, see
    `bind`; an asyncio task does. Backward needs no block: it follows the forward pass, checkpointing of transformers'
    models included. A model that calls `torch.utils.checkpoint.checkpoint` in code of its own runs that part again
    under the selection at the time of backward; pass `bind(function)` there, or run backward inside the block.

    Args:
        model: A model with adapters, or a part of one: then only the adapters in that part are off.

    Raises:
        ConfigError: The block is left in another thread or task than the one that entered it.
    """
    with choosing(_choices(model, NONE)):
        yield


@contextmanager
def selected(model: nn.Module, methods: Sequence[Method]) -> Iterator[None]:
    """Let the adapters of some of a model's methods act alone inside the `with` block, as `disabled` lets none.

    Trained copies of modules act, too, unless there is no method.

    Args:
        model: A model with adapters, or a part of one.
        methods: Some of those that were attached.

    Raises:
        ConfigError: A method was not attached to the model, or the block is left in another thread or task.
    """
    found = {adapter.selected_as for method in methods for _, _, adapter in adapters_of(model, method, Adapter)}
    names = {*found, COPIES} if found else found
    with choosing(_choices(model, tuple(sorted(names)))):
        yield


def iter_acting(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Iterate over `(host path, host, adapter)` of the adapters that act in the running thread or task."""
    for path, host in iter_hosts(model):
        for adapter in _stack_of(host).acting(Adapter):
            yield path, host, adapter


def _choices(model: nn.Module, names: Names) -> dict[Selector, Choice]:
    """Choose the same names for every attachment that has hosts in a model, on these hosts."""
    paths: dict[Selector, list[str]] = {}
    for _, host in iter_hosts(model):
        stack = _stack_of(host)
        paths.setdefault(stack.selector, []).append(stack.path)
    choices = {}
    for selector, found in paths.items():
        is_whole = len(found) == selector.num_hosts
        choices[selector] = Choice(names, None if is_whole else tuple(found))
    return choices


def _stack_of(host: nn.Module) -> AdapterStack:
    stack = host._modules[RESERVED]
    assert isinstance(stack, AdapterStack)
    return stack
