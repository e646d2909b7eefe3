"""What a host computes where several adapters act on it: one sum for all rows, or each its own rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_lightning.adapters.arguments import by_position
from lora_lightning.adapters.base import ForwardAdapter, InputAdapter, OutputAdapter
from lora_lightning.adapters.functional.rows import take_apart
from lora_lightning.adapters.selection.rows import Mixture, Rows, first_size, put_rows, take_rows
from lora_lightning.adapters.selection.state import Choice, choosing, whole
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import ConfigError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def sum_forward(host: nn.Module, adapters: Sequence[ForwardAdapter], args: Any, kwargs: Any) -> Any:  # noqa: ANN401 - the host's own
    """Compute a host's forward with the updates of several adapters.

    Args:
        host: The host.
        adapters: Adapters whose updates add up (`why_not_added` is empty); more than one.
        args: The host's arguments.
        kwargs: The same by name.
    """
    first, *others = adapters
    args, kwargs = by_position(first.argument_names, args, kwargs)
    output = first(host, *args, **kwargs)
    for other in others:
        output = other(host, *args, base_output=output, **kwargs)
    return output


def mixed_forward(host: nn.Module, stack: Any, rows: Rows, adapters: Sequence[ForwardAdapter], given: Arguments) -> Any:  # noqa: ANN401 - the host's own
    """Compute a host's forward for a batch whose rows have adapters of their own.

    The bare host computes all rows once; what an adapter cannot add to that, it computes anew for its rows.

    Args:
        host: The host.
        stack: Its adapters.
        rows: The rows of each.
        adapters: Those that act.
        given: The host's arguments.

    Raises:
        ConfigError: The host writes into a cache that holds all rows, or returns what cannot be put together by row.
    """
    total = first_size(given)
    count = rows.count_in(total, stack.path)
    if adapters[0].mixes_itself:
        return adapters[0].mixed(host, Mixture(adapters, rows, count), *given)
    _refuse_cache(given, stack.path, adapters)
    output = stack.host_class.forward(host, *given[0], **given[1])
    output = _with_updates(host, output, Mixture([one for one in adapters if one.adds_to_base], rows, count), given)
    for adapter in adapters:
        if adapter.adds_to_base:
            continue
        index = rows.index_of(adapter.name, count)
        args, kwargs = take_rows(given, index, total)
        if kwargs and not adapter.takes_names:
            args, kwargs = by_position(adapter.argument_names, args, kwargs)
        if adapter.extends_base:
            own = adapter(host, *args, base_output=take_rows(output, index, total), **kwargs)
        else:
            own = _call_alone(stack, adapter, host, args, kwargs)
        output = put_rows(output, own, index, total, stack.path)
    return output


def _refuse_cache(given: Arguments, path: str, adapters: Sequence[ForwardAdapter]) -> None:
    """Raise ConfigError if a host, computed anew for some rows, would write them into the cache of all rows."""
    has_cache = any("Cache" in type(value).__name__ for value in (*given[0], *given[1].values()))
    computed_anew = [adapter for adapter in adapters if not adapter.extends_base]
    if has_cache and computed_anew:
        raise ConfigError(
            f"The adapter {computed_anew[0].name!r} cannot act on some rows of a batch: {path!r} writes keys and "
            "values of all rows into one cache. Leave it out of the targets, call the model with use_cache=False, or "
            "give the adapter batches of its own, inside active(model, name)."
        )


def mixed_input(
    host: nn.Module,
    stack: Any,  # noqa: ANN401 - AdapterStack
    rows: Rows,
    adapters: Sequence[InputAdapter],
    given: Arguments,
) -> Arguments:
    """Return a host's arguments as the adapters of the rows change them."""
    total = first_size(given)
    count = rows.count_in(total, stack.path)
    if adapters[0].mixes_itself:
        return adapters[0].mixed(host, Mixture(adapters, rows, count), *given)
    args, kwargs = by_position(adapters[0].argument_names, *given)
    for adapter in adapters:
        index = rows.index_of(adapter.name, count)
        changed = adapter(host, *take_rows((args, kwargs), index, total))
        args, kwargs = put_rows((args, kwargs), changed, index, total, stack.path)
    return args, kwargs


def mixed_output(
    host: nn.Module,
    stack: Any,  # noqa: ANN401 - AdapterStack
    rows: Rows,
    adapters: Sequence[OutputAdapter],
    given: Arguments,
    output: Any,  # noqa: ANN401 - what the host returns
) -> Any:  # noqa: ANN401 - what the host returns
    """Return what a host returned as the adapters of the rows change it."""
    total = first_size(given)
    count = rows.count_in(total, stack.path)
    if adapters[0].mixes_itself:
        return adapters[0].mixed(host, Mixture(adapters, rows, count), *given, output)
    for adapter in adapters:
        index = rows.index_of(adapter.name, count)
        args, kwargs = take_rows(given, index, total)
        own = adapter(host, args, kwargs, take_rows(output, index, total))
        output = put_rows(output, own, index, total, stack.path)
    return output


def _with_updates(host: nn.Module, output: Any, mixture: Mixture, given: Arguments) -> Any:  # noqa: ANN401 - the host's own
    """Add the updates of some rows to a host's output, in place: such hosts do not need it for backward."""
    if not mixture.adapters:
        return output
    (x, *rest), kwargs = by_position(mixture.adapters[0].argument_names, *given)
    indices = tuple(mixture.index_of(adapter) for adapter in mixture.adapters)
    for adapter, index, own in zip(mixture.adapters, indices, take_apart(x, indices), strict=True):
        update = adapter(host, own, *rest, update_only=True, **kwargs)
        # torch forbids to write into views that a custom Function returned, as products of 4-bit weights are.
        may_write = torch.compiler.is_dynamo_compiling() or not output._is_view()
        add = output.index_add_ if may_write else output.index_add
        output = add(0, index, update.to(output.dtype))
    return output


def _call_alone(stack: Any, adapter: ForwardAdapter, host: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ANN401 - the host's own
    """Call an adapter that computes its rows anew; hosts inside its host then see these rows alone."""
    has_inner = any(RESERVED in module._modules for module in host.modules() if module is not host)
    if not has_inner:
        return adapter(host, *args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        raise ConfigError(f"per_row cannot be compiled where adapters lie inside {stack.path!r}, which has one too.")
    with choosing({stack.selector: Choice((whole(adapter.name),), None)}):
        return adapter(host, *args, **kwargs)
