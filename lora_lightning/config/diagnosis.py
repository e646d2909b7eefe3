"""Finds errors in settings by comparing them with the signatures of the classes that they name.

jsonargparse decides whether settings are valid. If it refuses them, this module finds the setting that is wrong, since
the parser's message lists every alternative that it tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import lightning as L
from jsonargparse import ArgumentError, ArgumentParser

from lora_lightning.adapters.base import PEFT_SPELLINGS, Method
from lora_lightning.config.parser_errors import missing_package, own_message, refused_import
from lora_lightning.config.right_words.misplaced import right_setting, right_value, settings_known
from lora_lightning.config.settings import CLASS_PATH, DICT_KWARGS, INIT_ARGS, SPEC_KEYS, Settings
from lora_lightning.config.signatures import (
    Parameters,
    alternatives,
    builds,
    describe,
    find_class,
    is_class_type,
    parameters_of,
    subclasses,
)
from lora_lightning.config.strict_yaml import KeyPath
from lora_lightning.errors import ConfigError
from lora_lightning.imports import import_class, import_object
from lora_lightning.trust import is_allowed, refusal
from lora_lightning.wording import one_line, suggestion


@dataclasses.dataclass(frozen=True)
class Problem:
    """A mistake.

    Args:
        path: The keys that lead to it.
        message: What is wrong.
        is_unknown: Whether the last key names no setting.
    """

    path: KeyPath
    message: str
    is_unknown: bool = False


def explain(settings: Settings, schema: Parameters) -> str | None:
    """Return one line that says what is wrong with the settings, or None if no error is found.

    Args:
        settings: What the user wrote.
        schema: The type of each top-level key: `model`, `data`, `ckpt_path`, …; if a type is a `Parameters`, the key is
            a group of plain settings, such as the trainer's.
    """
    problem = next(_problems_of_arguments(settings.tree, schema, ()), None)
    return None if problem is None else _told(problem, settings, schema)


def refuse_ignored(settings: Settings, schema: Parameters) -> None:
    """Refuse a key that names no setting and has no value, which the parser ignores silently.

    Args:
        settings: What the user wrote.
        schema: As `explain` takes it.

    Raises:
        ConfigError: There is such a key.
    """
    empties = set(_empties(settings.tree, ()))
    if not empties:
        return
    unknown = (problem for problem in _problems_of_arguments(settings.tree, schema, ()) if problem.is_unknown)
    problem = next((problem for problem in unknown if problem.path in empties), None)
    if problem is not None:
        raise ConfigError(_told(problem, settings, schema))


def refusal_of_building(error: Exception, settings: Settings, schema: Parameters) -> str | None:
    """Return one line about an exception with which a class refuses its settings, or None if it is a bug.

    Args:
        error: The exception.
        settings: What the user wrote.
        schema: As `explain` takes it.
    """
    missing = missing_package(error)
    if missing is not None or isinstance(error, ImportError):
        return missing
    return explain(settings, schema) or own_message(error)


def _told(problem: Problem, settings: Settings, schema: Parameters) -> str:
    """Return a problem as one line, with the intended setting if that is certain, and with its file and line."""
    message = problem.message
    if problem.is_unknown:
        written = ".".join(key for key in problem.path if key != INIT_ARGS)
        right = right_setting(written, settings_known(schema, settings.tree), as_flag=False)
        message = f"unknown key `{dotted(problem.path)}`; use {right}" if right else message
    origin = settings.origin(problem.path)
    return f"{origin}: {message}" if origin else message


def _empties(tree: Any, path: KeyPath) -> Iterator[KeyPath]:  # noqa: ANN401 - values out of YAML are of any type
    """Yield the path of each value that is empty."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _empties(value, (*path, str(key)))
    elif tree is None or tree == {} or tree == []:
        yield path


def problems(value: Any, hint: Any, path: KeyPath) -> Iterator[Problem]:  # noqa: ANN401 - any value, any type hint
    """Yield what is wrong with a value where a type is expected."""
    if isinstance(hint, Parameters):
        yield from _problems_of_arguments(value, hint, path)
        return
    parts = alternatives(hint)
    if Any in parts or (value is None and type(None) in parts):
        return
    classes = [part for part in parts if is_class_type(part)]
    if isinstance(value, dict) and classes:
        yield from _problems_of_spec(value, _best_class(value, classes), path)
    elif isinstance(value, str) and classes and str not in parts:
        yield from _problems_of_spec({CLASS_PATH: value}, _best_class({CLASS_PATH: value}, classes), path)
    elif isinstance(value, list) and (item := _class_item(parts)) is not None:
        for position, one in enumerate(value):
            yield from problems(one, item, (*path, str(position)))
    else:
        error = _error_of(hint, value)
        if error is not None:
            right = right_value(hint, value)
            expected = f"{dotted(path)}: expected {describe(hint)}, got {value!r}"
            if right is not None:
                expected = f"{dotted(path)}: {value!r} is not a value of it; did you mean `{right}`?"
            yield Problem(path, refused_import(error) or expected)


def dotted(path: KeyPath) -> str:
    """Write a path of keys like a flag.

    Example:
        >>> dotted(("model", "init_args", "r"))
        'model.init_args.r'
    """
    return ".".join(path)


def _problems_of_arguments(arguments: Any, parameters: Parameters, path: KeyPath) -> Iterator[Problem]:  # noqa: ANN401 - values out of YAML are of any type
    if not isinstance(arguments, dict):
        yield Problem(path, f"{dotted(path)}: expected a mapping, got {arguments!r}")
        return
    for key, value in arguments.items():
        place = (*path, str(key))
        if key in parameters.types:
            yield from problems(value, parameters.types[key], place)
        elif not parameters.is_open:
            text = f"unknown key `{dotted(place)}`; {suggestion(str(key), parameters.types)}"
            yield Problem(place, text, is_unknown=True)
    for name in sorted(parameters.required - arguments.keys()):
        yield Problem(path, f"`{dotted((*path, name))}` is missing; give {describe(parameters.types[name])}")


def _problems_of_spec(spec: dict[str, Any], expected: type, path: KeyPath) -> Iterator[Problem]:
    """Yield what is wrong with `{class_path, init_args}`, or with arguments given without their class."""
    named = spec.get(CLASS_PATH, expected.__name__)
    cls = find_class(str(named), expected)
    full = f"{cls.__module__}.{cls.__qualname__}" if cls is not None else named
    if not is_allowed(full):
        yield Problem((*path, CLASS_PATH), refusal(str(full), f"`{dotted(path)}`"))
        return
    if cls is None:
        cls, problem = _own_class(str(named), expected, path)
        if problem is not None:
            yield problem
        if cls is None:
            return
    if CLASS_PATH not in spec and INIT_ARGS not in spec:
        inside, arguments = path, spec
    else:
        inside, arguments = (*path, INIT_ARGS), spec.get(INIT_ARGS) or {}
        for key in sorted(spec.keys() - SPEC_KEYS):
            is_argument = key in parameters_of(cls).types
            hint = f"it goes under `{INIT_ARGS}`" if is_argument else suggestion(key, SPEC_KEYS)
            yield Problem((*path, key), f"unknown key `{dotted((*path, key))}`; {hint}")
    if issubclass(cls, Method) and isinstance(arguments, dict):
        yield from _foreign_spellings(cls, arguments, inside)
    found = list(_problems_of_arguments(arguments, parameters_of(cls), inside))
    yield from found
    if not found and dataclasses.is_dataclass(cls) and DICT_KWARGS not in spec:
        yield from _problem_of_building(cls, arguments, inside)


def _own_class(name: str, expected: type, path: KeyPath) -> tuple[type | None, Problem | None]:
    """Import the class that a setting names; without one, say what is wrong with the name.

    A function that builds an object of the class is good too: both are None then.
    """
    where = f"`{dotted(path)}`"
    if "." not in name:
        text = f"unknown class `{name}` at {where}; {suggestion(name, subclasses(expected))}"
        return None, Problem((*path, CLASS_PATH), text)
    try:
        found = import_object(name, expected, where)
        if builds(found, expected):
            return None, None
        return import_class(name, expected, where), None
    except ConfigError as error:
        hint = _hint_of_callback(name, expected)
        return None, Problem((*path, CLASS_PATH), f"{where}: {error}{hint}")


def _hint_of_callback(name: str, expected: type) -> str:
    """Return how to train a LightningModule that is not a task, if a name stands for one."""
    is_module = find_class(name, L.LightningModule) is not None
    if not is_module or not issubclass(expected, L.LightningModule):
        return ""
    return " To train it as it is, use the callback AdapterFinetuning in a script of your own."


def _foreign_spellings(cls: type[Method], arguments: dict[str, Any], path: KeyPath) -> Iterator[Problem]:
    for key in sorted(arguments.keys() & PEFT_SPELLINGS.keys() - parameters_of(cls).types.keys()):
        yield Problem((*path, key), f"unknown key `{dotted((*path, key))}`; use {PEFT_SPELLINGS[key]}")


def _problem_of_building(cls: type, arguments: dict[str, Any], path: KeyPath) -> Iterator[Problem]:
    """Yield the sentence with which a dataclass refuses its values."""
    try:
        cls(**arguments)
    except ValueError as error:
        message = one_line(error)
        named = next((name for name in arguments if f" {name} " in f" {message} "), None)
        place = path if named is None else (*path, named)
        yield Problem(place, f"{dotted(place)}: {message}")
    except TypeError:  # arguments that are themselves classes
        return


def _best_class(spec: dict[str, Any], classes: list[type]) -> type:
    """Return the one of several allowed base classes that a spec's class belongs to, else the first."""
    name = str(spec.get(CLASS_PATH, ""))
    return next((cls for cls in classes if find_class(name, cls)), classes[0])


def _class_item(parts: tuple[Any, ...]) -> Any:  # noqa: ANN401 - a type hint
    """Return the type of a list's items where these are classes."""
    for part in parts:
        arguments = get_args(part)
        if get_origin(part) is not None and arguments and any(map(is_class_type, alternatives(arguments[0]))):
            return arguments[0]
    return None


def _error_of(hint: Any, value: Any) -> str | None:  # noqa: ANN401 - type hints have no common type
    """Return the error of jsonargparse for a plain value of a type, or None if it accepts the value."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
        parser.parse_object({"value": value})
    except ArgumentError as error:
        return str(error)
    except (ValueError, TypeError):  # a type that only the full parser knows
        return None
    return None
