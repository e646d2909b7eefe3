"""Keywords that classes forward to their bases through `**settings`: what a class takes in all, and what it refuses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from inspect import Parameter
from typing import Any, Self, TypeVar

from lora_lightning.errors import ConfigError
from lora_lightning.paths import nearest
from lora_lightning.trust import LIBRARY

T = TypeVar("T")


class UnknownSetting(ConfigError, TypeError):  # noqa: N818 - reads as the fact it states
    """A keyword that no constructor takes; also the `TypeError` that Python raises for it."""


class NamesNearest:
    """A class that refuses a misspelt keyword of its constructor with the nearest right one."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:  # noqa: ANN401 - those of the constructor
        """Refuse keywords that nothing takes.

        Raises:
            UnknownSetting: There are such keywords.
        """
        del args  # the constructor counts them
        refuse_unknown(cls, settings)
        return super().__new__(cls)


def names_nearest(cls: type[T]) -> type[T]:
    """Have a dataclass refuse a misspelt keyword with the nearest right one; a decorator.

    A base class would do, but jsonargparse writes a dataclass with other bases into configs as a class with arguments.
    """
    build: Any = cls.__init__

    @functools.wraps(build)
    def __init__(self: T, *args: Any, **settings: Any) -> None:  # noqa: ANN401, N807 - the constructor's own
        refuse_unknown(type(self), settings)
        build(self, *args, **settings)

    cls.__init__ = __init__  # type: ignore[assignment]  # it has the constructor's signature
    return cls


class ForwardsSettings(NamesNearest):
    """A class whose constructor forwards `**settings` to its base instead of repeating the base's parameters.

    The signature lists the settings of all bases, for `help()` and editors.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401 - those of other bases
        """Give the class the signature of all that it takes."""
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]  # `inspect` looks for it


def parameters_taken(cls: type) -> tuple[dict[str, Parameter], bool]:
    """Return the parameters that a class can be built with, and whether it may take more than these.

    The constructors of this library forward `**kwargs` to the next class. What another class does with its own
    `**kwargs` is unknown: it ends the search.

    Example:
        >>> class Own:
        ...     def __init__(self, width, **kwargs): ...
        >>> parameters, is_open = parameters_taken(Own)
        >>> list(parameters), is_open
        (['width'], True)
    """
    taken: dict[str, Parameter] = {}
    hands_on_positions = True
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        own = _own_parameters(base)
        kinds = {one.kind for one in own}
        for one in own:
            if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                continue
            # What a base takes by position, its subclass takes as a keyword unless it has `*args`.
            taken.setdefault(one.name, one if hands_on_positions else one.replace(kind=one.KEYWORD_ONLY))
        if Parameter.VAR_KEYWORD not in kinds:
            return taken, False
        if base.__module__.partition(".")[0] != LIBRARY:
            return taken, True
        hands_on_positions = hands_on_positions and Parameter.VAR_POSITIONAL in kinds
    return taken, True


def signature_of(cls: type) -> inspect.Signature:
    """Return the signature of a class's constructor, with what it forwards to its bases as keywords."""
    parameters, is_open = parameters_taken(cls)
    if is_open:
        return inspect.Signature(_own_parameters(cls))
    in_order: list[Any] = [Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY]
    return inspect.Signature(sorted(parameters.values(), key=lambda one: in_order.index(one.kind)))


def refuse_unknown(cls: type, settings: Iterable[str]) -> None:
    """Refuse keywords that neither a class nor those that it forwards to take.

    Args:
        cls: The class that is built.
        settings: The keywords that it was given.

    Raises:
        UnknownSetting: There are such keywords; the nearest right one is named.
    """
    known, is_open = parameters_taken(cls)
    unknown = [name for name in settings if name not in known]
    if unknown and not is_open:
        raise UnknownSetting(f"{cls.__name__} has no setting {unknown[0]!r}; {remedy(unknown[0], known)}")


def remedy(name: str, known: Iterable[str]) -> str:
    """Say what to write instead of an unknown setting.

    Example:
        >>> remedy("bacbone", ["backbone", "method"])
        'did you mean `backbone`?'
        >>> remedy("xyz", ["backbone", "method"])
        'it takes backbone, method.'
    """
    near = nearest(name, known)
    return f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(sorted(known))}."


def _own_parameters(cls: type) -> list[Parameter]:
    """Return the parameters of a class's constructor, without the object itself."""
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]  # asked of a class
