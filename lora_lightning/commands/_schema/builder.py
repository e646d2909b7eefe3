"""From Python's types and classes to JSON Schema."""

from __future__ import annotations

import collections.abc
import dataclasses
import os
import types
import typing
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union

from lora_lightning.commands._schema.signatures import MISSING, Setting, settings_of, subclasses, summary_of
from lora_lightning.trust import LIBRARY

Schema = dict[str, Any]
ELSEWHERE: Schema = {"type": "string", "pattern": rf"^(?!{LIBRARY}\.)\w+(\.\w+)+$"}
"""The import path of a class that is not this library's."""
FILE: Schema = {"type": "string", "pattern": r"\.ya?ml$"}
"""A section in a separate file."""
_PLAIN: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    type(None): {"type": "null"},
    Path: {"type": "string"},
    os.PathLike: {"type": "string"},
    dict: {"type": "object"},
    list: {"type": "array"},
    timedelta: {"type": "string"},
}


class Builder:
    """Makes schemas of types, and collects those of classes as definitions.

    Args:
        kinds: Base classes whose subclasses a config names, by the name of their definition. Any other class that is
            not a dataclass may have any name.

    Attributes:
        definitions: The schemas by name, for `$defs`.
    """

    def __init__(self, kinds: Mapping[str, type]) -> None:
        self.kinds = kinds
        self.definitions: dict[str, Schema] = {}

    def of_type(self, hint: Any) -> Schema:  # noqa: ANN401 - a type hint
        """Return the schema of the values of a type, as a config file writes them."""
        if hint is Any:  # which is a class
            return {}
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            return _any_of(self.of_type(one) for one in arguments)
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin is type or origin is collections.abc.Callable:
            return {"type": "string"}
        if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
            values = self.of_type(arguments[1]) if len(arguments) > 1 else {}
            return {"type": "object", "additionalProperties": values}
        if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
            return {"type": "array", "items": self.of_type(arguments[0])} if arguments else {"type": "array"}
        if hint in _PLAIN:
            return dict(_PLAIN[hint])
        return self._of_class(hint) if isinstance(hint, type) else {}

    def of_settings(self, settings: Iterable[Setting], *, is_open: bool = False) -> Schema:
        """Return the schema of a mapping of settings."""
        settings = list(settings)
        schema: Schema = {
            "type": "object",
            "properties": {one.name: self._of_setting(one) for one in settings},
            "additionalProperties": is_open,
        }
        required = [one.name for one in settings if one.default is MISSING]
        return {**schema, "required": required} if required else schema

    def define_class(self, cls: type) -> Schema:
        """Define the arguments of a class, and return a reference to the definition."""
        if cls.__name__ not in self.definitions:
            self.definitions[cls.__name__] = {}  # a class may have settings of its own kind
            settings, is_open = settings_of(cls)
            arguments = self.of_settings(settings, is_open=is_open)
            self.definitions[cls.__name__] = {"description": summary_of(cls), **arguments}
        return reference(cls.__name__)

    def define_kind(self, name: str) -> Schema:
        """Define the values where a class of a kind is expected, and return a reference to the definition.

        A value is `{class_path, init_args}`, or only the name if the class needs no arguments, by its short name or an
        import path. Of a class from elsewhere only its name is checked, which must have a dot.
        """
        if name not in self.definitions:
            self.definitions[name] = {}
            classes = [cls for cls in subclasses(self.kinds[name]) if cls is not self.kinds[name]]
            self.definitions[name] = self._of_kind(name, classes)
        return reference(name)

    def _of_kind(self, name: str, classes: list[type]) -> Schema:
        names = {cls: names_of(cls) for cls in classes}
        every = [one for cls in classes for one in names[cls]]
        conditions: list[Schema] = []
        bare: list[str] = []
        for cls in classes:
            arguments = self.define_class(cls)
            needs_some = "required" in self.definitions[cls.__name__]
            bare += [] if needs_some else names[cls]
            then: Schema = {"properties": {"init_args": _or_null(arguments, allowed=not needs_some)}}
            condition = {"properties": {"class_path": {"enum": names[cls]}}, "required": ["class_path"]}
            conditions.append({"if": condition, "then": {**then, "required": ["init_args"]} if needs_some else then})
        spec: Schema = {
            "type": "object",
            "properties": {
                "class_path": {"anyOf": [{"enum": every}, ELSEWHERE], "description": f"The class: a {name}."},
                "init_args": {"description": "Its settings."},
                "dict_kwargs": {"type": "object", "description": "Further keywords of a class from elsewhere."},
            },
            "required": ["class_path"],
            "additionalProperties": False,
            "allOf": conditions,
        }
        return {"description": summary_of(self.kinds[name]), "anyOf": [spec, {"enum": bare}, ELSEWHERE]}

    def _of_class(self, cls: type) -> Schema:
        kind = next((name for name, base in self.kinds.items() if base is cls), None)
        if kind is not None:
            return self.define_kind(kind)
        if dataclasses.is_dataclass(cls):
            return self.define_class(cls)
        if issubclass(cls, str | int | float):
            return {"type": "string"}
        spec = {
            "type": "object",
            "properties": {"class_path": {"type": "string"}, "init_args": {"type": "object"}, "dict_kwargs": {}},
            "required": ["class_path"],
            "additionalProperties": False,
        }
        return {"anyOf": [spec, {"type": "string"}]}

    def _of_setting(self, setting: Setting) -> Schema:
        schema = self.of_type(setting.hint)
        if setting.description:
            schema = {**schema, "description": setting.description}
        default = plain_default(setting.default)
        return schema if default is MISSING else {**schema, "default": default}


def reference(name: str) -> Schema:
    """Return a reference to a definition.

    Example:
        >>> reference("LoRA")
        {'$ref': '#/$defs/LoRA'}
    """
    return {"$ref": f"#/$defs/{name}"}


def names_of(cls: type) -> list[str]:
    """Return the names by which a config may name a class, the short one first.

    Example:
        >>> from lora_lightning.methods import LoRA
        >>> names_of(LoRA)
        ['LoRA', 'lora_lightning.LoRA', 'lora_lightning.methods.LoRA', 'lora_lightning.methods.lora.LoRA']
    """
    parts = cls.__module__.split(".")
    if parts[0] != LIBRARY:
        return [cls.__name__]
    packages = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return [cls.__name__, *(f"{package}.{cls.__name__}" for package in packages)]


def plain_default(value: Any) -> Any:  # noqa: ANN401 - defaults are of any type
    """Return a default in JSON types, or `MISSING` if there is none or it has no such form.

    Example:
        >>> plain_default((1, "a")), plain_default(object) is MISSING
        ([1, 'a'], True)
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(plain_default(one) is not MISSING for one in value):
        return [plain_default(one) for one in value]
    return MISSING


def _any_of(schemas: Iterable[Schema]) -> Schema:
    """Join schemas, each once; plain types become one list of types."""
    distinct: list[Schema] = []
    for schema in schemas:
        for one in schema["anyOf"] if list(schema) == ["anyOf"] else [schema]:
            if one not in distinct:
                distinct.append(one)
    if {} in distinct:
        return {}
    if len(distinct) == 1:
        return distinct[0]
    if all(list(one) == ["type"] for one in distinct):
        return {"type": [one["type"] for one in distinct]}
    return {"anyOf": distinct}


def _or_null(schema: Schema, *, allowed: bool) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]} if allowed else schema
