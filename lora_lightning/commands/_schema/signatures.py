"""What a class or function takes, with types, defaults and descriptions."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

import docstring_parser

from lora_lightning.keywords import parameters_taken
from lora_lightning.trust import LIBRARY

MISSING: Any = dataclasses.MISSING
"""The default of a setting that must be given."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One parameter of a class or function.

    Args:
        name: Its name.
        hint: Its type; `Any` where none is known.
        default: Its default, or `MISSING`.
        description: What its docstring says, on one line; empty if nothing.
    """

    name: str
    hint: Any
    default: Any
    description: str


def settings_of(cls: type) -> tuple[list[Setting], bool]:
    """Return what a class can be built with, and whether it may take more than that."""
    words = _descriptions(cls)
    if dataclasses.is_dataclass(cls):
        hints = _hints(cls)
        fields = [field for field in dataclasses.fields(cls) if field.init]
        found = [
            Setting(one.name, hints.get(one.name, Any), _field_default(one), words.get(one.name, "")) for one in fields
        ]
        return found, False
    parameters, is_open = parameters_taken(cls)
    hints = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            hints.update(_hints(base.__init__))  # type: ignore[misc]  # asked of a class, on purpose
    return [_setting(one, hints, words) for one in parameters.values()], is_open


def settings_of_function(function: Callable[..., Any]) -> list[Setting]:
    """Return the parameters of a function."""
    hints, words = _hints(function), _described_by(function)
    return [_setting(one, hints, words) for one in inspect.signature(function).parameters.values()]


def summary_of(documented: Any) -> str:  # noqa: ANN401 - a class or function
    """Return the first line of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def subclasses(cls: type) -> list[type]:
    """Return the public classes that can be built where a class is expected, sorted by name.

    These are classes of this library and of Lightning: whatever else a process has imported is not known elsewhere.
    """
    found = {one for one in (cls, *_below(cls)) if not inspect.isabstract(one)}
    known = [one for one in found if one.__module__.partition(".")[0] in (LIBRARY, "lightning")]
    shown = [one for one in known if not one.__name__.startswith("_") and "<locals>" not in one.__qualname__]
    return sorted(shown, key=lambda one: (one.__name__, one.__module__))


def _setting(parameter: inspect.Parameter, hints: dict[str, Any], words: dict[str, str]) -> Setting:
    name, default = parameter.name, parameter.default
    default = MISSING if default is parameter.empty else default
    return Setting(name, hints.get(name, Any), default, words.get(name, ""))


def _field_default(field: dataclasses.Field[Any]) -> Any:  # noqa: ANN401 - defaults are of any type
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _descriptions(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of its settings; the class's own goes first."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object:
            found.update(_described_by(base))
            if "__init__" in vars(base):
                found.update(_described_by(base.__init__))  # type: ignore[misc]  # asked of a class, on purpose
    return found


def _described_by(documented: Any) -> dict[str, str]:  # noqa: ANN401 - a class or function
    text = vars(documented).get("__doc__") if isinstance(documented, type) else documented.__doc__
    parsed = docstring_parser.parse(text or "")
    return {one.arg_name: " ".join((one.description or "").split()) for one in parsed.params if one.description}


def _hints(source: Any) -> dict[str, Any]:  # noqa: ANN401 - a class or function
    try:
        return typing.get_type_hints(source)
    except (NameError, TypeError, AttributeError):  # imported for type checkers only
        return {}


def _below(cls: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(cls)
    for child in children:
        yield child
        yield from _below(child)
