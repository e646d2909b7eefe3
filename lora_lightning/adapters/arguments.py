"""The arguments of a host's forward, which its callers give by position or by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def argument_names(host_class: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the arguments that a class's forward takes by position, in order.

    Example:
        >>> argument_names(nn.Linear), argument_names(nn.Bilinear)
        (('input',), ('input1', 'input2'))
    """
    _, *parameters = inspect.signature(host_class.forward).parameters.values()
    return tuple(one.name for one in parameters if one.kind in _BY_POSITION)


def by_position(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with the leading ones by position, however they were given.

    Args:
        names: What `argument_names` returns.
        args: The arguments by position.
        kwargs: The others.

    Example:
        >>> by_position(("x", "mask", "bias"), (1,), {"bias": 3, "mask": 2, "scale": 4})
        ((1, 2, 3), {'scale': 4})
        >>> by_position(("x", "mask", "bias"), (), {"bias": 3, "x": 1})
        ((1,), {'bias': 3})
    """
    rest = dict(kwargs)
    for name in names[len(args) :]:
        if name not in rest:
            break
        args = (*args, rest.pop(name))
    return args, rest
