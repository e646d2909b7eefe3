"""Blocks in which a model acts as its base, or with the adapters of some of its methods alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora_lightning.adapters.base import Adapter, Method
from lora_lightning.adapters.host import AdapterStack
from lora_lightning.adapters.selection.rows import Rows
from lora_lightning.adapters.selection.state import NONE, Choice, Names, Selector, choosing, part, whole
from lora_lightning.adapters.walk import (
    COPIES,
    RECORD,
    adapter_names,
    adapters_of,
    check_names,
    iter_adapters,
    iter_hosts,
    unwrap,
    was_attached_to,
)
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import ConfigError

__all__ = ["active", "disabled", "set_active"]


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
    with choosing(choices_of(model, NONE)):
        yield


@contextmanager
def active(model: nn.Module, names: str | Sequence[str] | None) -> Iterator[None]:
    """Let the adapters of some names act alone inside the `with` block.

    What `disabled` says about threads, asyncio tasks, checkpointing and parts of a model holds here too; blocks may be
    nested, and the inner one decides.

    Args:
        model: A model with adapters, or a part of one.
        names: A name that adapters were attached under; a list of names, whose updates add up; None for the base.

    Raises:
        ConfigError: No adapter has a name, several that do not add up share a host, or the block is left in
            another thread or task than the one that entered it.

    Example:
        >>> from torch import ones
        >>> from lora_lightning.adapters import attach
        >>> from lora_lightning.methods import LoRA
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("de", "fr"):
        ...     report = attach(model, LoRA(r=1), name=name)
        >>> with active(model, "fr"):
        ...     output = model(ones(1, 4))
    """
    with choosing(choices_of(model, _entries(model, names))):
        yield


def set_active(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Let the adapters of some names act from now on: in all threads, outside of blocks.

    Args:
        model: A model with adapters.
        names: As for `active`.

    Raises:
        ConfigError: As for `active`; or the model is a part of the one that the adapters were attached to.
    """
    entries = _entries(model, names)
    choices = choices_of(model, entries)
    if any(choice.hosts is not None for choice in choices.values()):
        raise ConfigError("set_active takes the model that the adapters were attached to, and got a part of it.")
    for selector in choices:
        selector.act_by_default(entries)


@contextmanager
def per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Let each row of a batch have the adapter of its own name inside the `with` block.

    The public one is `lora_lightning.per_row`, which also looks at how a model hands rows to its modules.

    Args:
        model: A model with adapters.
        names: For each row the name of its adapter; None for the base.

    Raises:
        ConfigError: No adapter has a name, adapters cannot be mixed in a batch, no name is given, or the block is left
            in another thread or task than the one that entered it.
    """
    if isinstance(names, str) or not names:
        raise ConfigError(f"per_row takes one name for each row of a batch, such as ['de', None, 'fr']; got {names!r}.")
    distinct = sorted({name for name in names if name is not None})
    check_names(model, distinct)
    for path, host, adapter in iter_adapters(model):
        reason = adapter.why_not_mixed(host) if adapter.name in distinct else ""
        if reason:
            raise ConfigError(
                f"The adapter {adapter.name!r} cannot act on some rows of a batch: at {path!r} {reason}. Give it "
                "batches of its own, inside active(model, name)."
            )
    device = next((parameter.device for parameter in model.parameters()), None)
    rows = Rows.of(names, device or torch.device("cpu"))
    with choosing(choices_of(model, tuple(map(whole, distinct)), rows)):
        yield


def acting_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that act in the running thread or task, in the order of attaching."""
    acting = {adapter.name for _, _, adapter in iter_acting(model)}
    return tuple(name for name in adapter_names(model) if name in acting)


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
    found = [adapter for method in methods for _, _, adapter in adapters_of(model, method, Adapter)]
    copies = {part(adapter.name, COPIES) for adapter in found}
    with choosing(choices_of(model, tuple(sorted({adapter.selected_as for adapter in found} | copies)))):
        yield


def iter_acting(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Iterate over `(host path, host, adapter)` of the adapters that act in the running thread or task."""
    for path, host in iter_hosts(model):
        for adapter in _stack_of(host).acting(Adapter):
            yield path, host, adapter


def _entries(model: nn.Module, names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the entries of a selection for names that users give; checks them."""
    if not (names is None or isinstance(names, (str, list, tuple))):
        raise ConfigError(f"A selection is a name, a list of names, or None for the base; got {names!r:.60}.")
    given = [] if names is None else [names] if isinstance(names, str) else list(names)
    check_names(model, given)
    if len(given) > 1:
        _check_sum(model, given)
    return tuple(sorted({whole(name) for name in given}))


def _check_sum(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ConfigError where adapters of several names share a host and their effects do not add up."""
    for path, host in iter_hosts(model):
        own = [adapter for adapter in _stack_of(host).of_kind(Adapter) if adapter.name in names]
        if len({adapter.name for adapter in own}) < 2:
            continue
        for adapter in own:
            reason = adapter.why_not_added()
            if reason:
                raise ConfigError(
                    f"The adapters {', '.join(names)} cannot act together: {adapter.name!r} {reason}, and shares "
                    f"{path!r} with another one. Choose one of them, or give each row its own with per_row."
                )


def choices_of(model: nn.Module, names: Names, rows: Rows | None = None) -> dict[Selector, Choice]:
    """Choose the same names for every attachment that has hosts in a model, on these hosts."""
    inner = unwrap(model)
    if was_attached_to(inner):  # which is then the only attachment, and has all its hosts in here
        return {inner.__dict__[RECORD].selector: Choice(names, None, rows)}
    paths: dict[Selector, list[str]] = {}
    for _, host in iter_hosts(model):
        stack = _stack_of(host)
        paths.setdefault(stack.selector, []).append(stack.path)
    choices = {}
    for selector, found in paths.items():
        is_whole = len(found) == selector.num_hosts
        choices[selector] = Choice(names, None if is_whole else tuple(found), rows)
    return choices


def _stack_of(host: nn.Module) -> AdapterStack:
    stack = host._modules[RESERVED]
    assert isinstance(stack, AdapterStack)
    return stack
