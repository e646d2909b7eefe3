"""Signatures of classes and functions: parameter names and types that a config file may set."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a class or function.

    Args:
        types: Type by name; `Any` where none is known.
        required: Names without a default.
        is_open: Whether further, unknown keywords are accepted.
    """

    types: dict[str, Any]
    required: frozenset[str] = frozenset()
    is_open: bool = False


def parameters_of(cls: type) -> Parameters:
    """Return the parameters of a class; `**kwargs` are resolved in its base classes.

    Example:
        >>> sorted(parameters_of(Parameters).types)
        ['is_open', 'required', 'types']
    """
    if dataclasses.is_dataclass(cls):
        return _of_fields(cls)
    known: dict[str, Any] = {}
    required: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in base.__dict__ or base is object:
            continue
        found = parameters_of_function(base.__init__)  # type: ignore[misc]  # asked of a class, on purpose
        required |= found.required - known.keys()
        known = {**found.types, **known}
        if not found.is_open:
            return Parameters(known, frozenset(required))
    return Parameters(known, frozenset(required), is_open=bool(known))


def parameters_of_function(function: Callable[..., Any]) -> Parameters:
    """Return the parameters of a function or method, without `self`."""
    signature = inspect.signature(function).parameters.values()
    hints = _hints(function)
    named = [p for p in signature if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Parameters(
        {p.name: hints.get(p.name, Any) for p in named},
        frozenset(p.name for p in named if p.default is p.empty),
        is_open=any(p.kind is p.VAR_KEYWORD for p in signature),
    )


def flag_names(parameters: Parameters) -> list[str]:
    """Return the flags that set parameters; those of a group carry its name.

    Example:
        >>> flag_names(Parameters({"seed": int, "trainer": Parameters({"max_epochs": int})}))
        ['--seed', '--trainer.max_epochs']
    """
    names: list[str] = []
    for name, hint in parameters.types.items():
        inner = flag_names(hint) if isinstance(hint, Parameters) else []
        names += [f"--{name}.{flag[2:]}" for flag in inner] or [f"--{name}"]
    return names


def alternatives(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401 - a type hint
    """Return the members of a union, or the type itself.

    Example:
        >>> alternatives(int | None)
        (<class 'int'>, <class 'NoneType'>)
    """
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(one for part in typing.get_args(hint) for one in alternatives(part))
    return (hint,)


_PLAIN = ("builtins", "datetime", "pathlib", "collections", "os")
"""Packages whose classes are written as plain values."""


def is_class_type(hint: Any) -> bool:  # noqa: ANN401 - a type hint
    """Return whether a type is written in a config as a class with arguments, not as a plain value."""
    return (
        isinstance(hint, type)
        and typing.get_origin(hint) is None
        and hint.__module__.partition(".")[0] not in _PLAIN  # Path is defined in pathlib._local from Python 3.13 on
        and not issubclass(hint, (str, int, float, dict, list, tuple))
    )


def subclasses(cls: type) -> dict[str, type]:
    """Return the public classes that can be built where `cls` is expected, by short name."""
    found: dict[str, type] = {}
    for candidate in (cls, *_descendants(cls)):
        hidden = candidate.__name__.startswith("_") or "<locals>" in candidate.__qualname__
        if not hidden and not inspect.isabstract(candidate):
            found.setdefault(candidate.__name__, candidate)
    return found


def find_class(name: str, expected: type) -> type | None:
    """Return the class that a short name or dotted path names, or None; imports nothing.

    Args:
        name: `LoRA` or `package.module.LoRA`.
        expected: The class that it must be or derive from.
    """
    if "." not in name:
        return subclasses(expected).get(name)
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if isinstance(found, type) and issubclass(found, expected) else None


def builds(function: Any, cls: type) -> bool:  # noqa: ANN401 - whatever a path names
    """Return whether a function declares that it returns an object of a class; a config may name it like the class.

    Example:
        >>> def three() -> int: ...
        >>> builds(three, int), builds(three, str), builds(int, int)
        (True, False, False)
    """
    returned = None if isinstance(function, type) or not callable(function) else _hints(function).get("return")
    return isinstance(returned, type) and issubclass(returned, cls)


def describe(hint: Any) -> str:  # noqa: ANN401 - a type hint
    """Describe the values that a type allows.

    Example:
        >>> describe(int | None), describe(list[str] | str), describe(Literal["a", "b"])
        ('an int', 'a list of strings or a string', 'one of a, b')
    """
    parts = [_describe_one(part) for part in alternatives(hint) if part is not type(None)]
    return " or ".join(dict.fromkeys(parts)) or "null"


_WORDS = {int: "an int", float: "a number", str: "a string", bool: "true or false", dict: "a mapping", list: "a list"}
_PLURALS = {int: "ints", float: "numbers", str: "strings", bool: "booleans"}


def _describe_one(hint: Any) -> str:  # noqa: ANN401 - type hints have no common type
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is dict:
        return "a mapping"
    if origin is not None and arguments and isinstance(origin, type) and issubclass(origin, typing.Iterable):
        return f"a list of {_PLURALS.get(arguments[0], getattr(arguments[0], '__name__', 'values'))}"
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', str(hint))}"


def _descendants(cls: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(cls)
    for subclass in children:
        yield subclass
        yield from _descendants(subclass)


def _of_fields(cls: type) -> Parameters:
    fields = [field for field in dataclasses.fields(cls) if field.init]
    hints = _hints(cls)
    missing = dataclasses.MISSING
    return Parameters(
        {field.name: hints.get(field.name, Any) for field in fields},
        frozenset(f.name for f in fields if f.default is missing and f.default_factory is missing),
    )


def _hints(source: Any) -> dict[str, Any]:  # noqa: ANN401 - a class or function
    try:
        return typing.get_type_hints(source)
    except (NameError, TypeError, AttributeError):  # imported for type checkers only
        return {}
