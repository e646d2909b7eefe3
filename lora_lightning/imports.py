"""Imports of modules and classes that a user names, with one sentence for each way in which they fail."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_lightning.errors import ConfigError
from lora_lightning.trust import check_import
from lora_lightning.wording import nearest, one_line, suggestion

MAX_LENGTH = 200
"""Characters of another error's text that are shown."""

_LIBRARIES = (
    Path(__file__).parent,
    *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")),
)


def import_module(name: str) -> ModuleType:
    """Import a module by its name.

    Raises:
        ConfigError: The name is malformed, there is no such module, or the module fails while it is imported.
    """
    _check_form(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        is_named = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        message = _no_such_module(str(error.name)) if is_named else failure_of_import(error, name)
        raise ConfigError(message) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(failure_of_import(error, name)) from error


def import_object(path: str, expected: type, source: str) -> Any:  # noqa: ANN401 - whatever the module holds
    """Import what a dotted path names: a class, or a function that builds one.

    Args:
        path: `module.Class`; `module.Outer.Inner` names a class inside a class.
        expected: The class whose subclasses the message offers instead.
        source: What names it, for the message of strict mode.

    Raises:
        ConfigError: Strict mode does not allow it, the module cannot be imported, or it has no such name.

    Example:
        >>> import_object("collections.OrderedDict", dict, "--model").__name__
        'OrderedDict'
    """
    _check_form(path)
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"`{path}` names no module. Give the import path of the class, such as my_task.{path}.")
    check_import(path, source)
    holder = _module_or_class(module_name)
    try:
        return getattr(holder, name)
    except AttributeError as error:
        raise ConfigError(_no_such_name(holder, name, expected)) from error
    except Exception as error:  # a module that imports its names when they are asked for
        raise ConfigError(failure_of_import(error, module_name)) from error


def import_class(path: str, expected: type, source: str) -> type:
    """Import the class that a dotted path names.

    Args:
        path: `module.Class`.
        expected: The class that it must be or derive from.
        source: What names it, for the message of strict mode.

    Raises:
        ConfigError: Strict mode does not allow it, it cannot be imported, or it is not a subclass of `expected`.

    Example:
        >>> import_class("collections.Counter", dict, "--model").__name__
        'Counter'
    """
    found = import_object(path, expected, source)
    if not (isinstance(found, type) and issubclass(found, expected)):
        raise ConfigError(wrong_type(path, found, expected))
    check_import(f"{found.__module__}.{found.__qualname__}", source)  # a module may import another's class
    return found


def wrong_type(path: str, found: Any, expected: type) -> str:  # noqa: ANN401 - whatever a module holds
    """Return the sentence about an object that stands where a subclass of `expected` must."""
    others = _subclasses_in(sys.modules.get(path.rpartition(".")[0]), expected)
    instead = f"name one of the same module: {', '.join(others)}" if others else "name another class"
    if not isinstance(found, type):
        return f"`{path}` is of the type {type(found).__name__}, not a subclass of {_public(expected)}; {instead}."
    return (
        f"`{path}` is a class, but not a subclass of {_public(expected)}. Derive it from {expected.__name__} or from a "
        f"subclass of it, or {instead}."
    )


def _public(cls: type) -> str:
    """Return the shortest path by which a class can be imported."""
    parts = cls.__module__.split(".")
    packages = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    shortest = next((one for one in packages if getattr(sys.modules.get(one), cls.__name__, None) is cls), None)
    return f"{shortest or cls.__module__}.{cls.__qualname__}"


def failure_of_import(error: BaseException, name: str | None = None) -> str:
    """Return the sentence about a module that fails while it is imported: its own error, with file and line.

    Args:
        error: What the module raised.
        name: The module that was imported; None takes the one whose code raised.
    """
    frames = [frame for frame, _ in _frames_of_import(error)]
    if name is None:
        name = frames[0].f_globals.get("__name__", "?") if frames else "?"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    told = one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    shown = told if len(told) <= MAX_LENGTH else told[:MAX_LENGTH] + "…"
    place = _location(error)
    if isinstance(error, SystemExit):
        to_do = "Put the code that runs a program under `if __name__ == '__main__':`."
    elif isinstance(error, ModuleNotFoundError):
        to_do = f"Install the package of {error.name}, or correct the import."
    else:
        to_do = "Correct the module."
    return f"The module `{name}` fails while it is imported: {shown}{f' ({place})' if place else ''}. {to_do}"


def is_failure_of_import(error: BaseException) -> bool:
    """Return whether an exception left a module while that was imported."""
    return next(_frames_of_import(error), None) is not None


def _check_form(path: str) -> None:
    if all(word.isidentifier() for word in path.split(".")):
        return
    if "<locals>" in path:
        raise ConfigError(f"`{path}` is defined inside a function and cannot be imported. Define it in a module.")
    raise ConfigError(f"`{path}` is not an import path. Give names joined by dots, such as my_task.MyTask.")


def _module_or_class(name: str) -> Any:  # noqa: ANN401 - a module, or a class that holds others
    """Import a module, or take the class of this name out of the module that defines it."""
    try:
        return import_module(name)
    except ConfigError:
        outer, _, last = name.rpartition(".")
        holder = getattr(sys.modules.get(outer), last, None)
        if not isinstance(holder, type):
            raise
        return holder


def _no_such_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    if not parent:
        if str(Path.cwd()) not in sys.path and "" not in sys.path and last in _files_here():
            return (
                f"There is no module `{name}` among the installed ones, and this Python does not look into "
                f"{Path.cwd()}, which holds {last}.py. Run it without -P (PYTHONSAFEPATH), or add the folder to "
                "PYTHONPATH."
            )
        near = nearest(last, _files_here(), count=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Run the command in the folder of {last}.py, or install it."
        return f"There is no module `{name}` among the installed ones and in {Path.cwd()}. {hint}"
    paths = getattr(sys.modules.get(parent), "__path__", None)
    if paths is None:
        return f"There is no module `{name}`: `{parent}` is a module, not a package. Leave out what follows it."
    inside = [module.name for module in pkgutil.iter_modules(paths)]
    return f"There is no module `{name}`; {suggestion(last, inside, f'the package `{parent}` holds')}"


def _no_such_name(module: ModuleType | type, name: str, expected: type) -> str:
    if isinstance(module, type):
        return f"The class `{module.__qualname__}` of the module `{module.__module__}` has no class `{name}`."
    file = getattr(module, "__file__", None)
    origin = f" ({_short(file)})" if file else ""
    known = _subclasses_in(module, expected)
    if name == "py":
        hint = f"name a class of the file, not the file: {module.__name__}.{(known or ['MyClass'])[0]}."
    elif known:
        near = nearest(name, known, count=1)
        names = ", ".join(known)
        hint = f"did you mean `{near[0]}`?" if near else f"its subclasses of {expected.__name__}: {names}."
    elif module.__name__ == "__main__":
        hint = f"it was defined in a script; name the script's module instead, such as my_script.{name}."
    else:
        hint = f"it defines no subclass of {_public(expected)}."
    return f"The module `{module.__name__}`{origin} has no class `{name}`; {hint}"


def _subclasses_in(module: ModuleType | None, expected: type) -> list[str]:
    """Return the names of the subclasses of a class that a module or package defines, without those it imports."""
    classes = {name: value for name, value in vars(module or object).items() if isinstance(value, type)}
    inside = f"{getattr(module, '__name__', '')}."
    return [
        name
        for name, cls in classes.items()
        if issubclass(cls, expected) and cls is not expected and f"{cls.__module__}.".startswith(inside)
    ]


def _files_here() -> list[str]:
    """Return the names under which files and packages of the current folder can be imported."""
    return [module.name for module in pkgutil.iter_modules([str(Path.cwd())])]


def _frames_of_import(error: BaseException) -> Iterator[tuple[Any, int]]:
    """Yield the frames, with their lines, of the modules that were being imported as an exception was raised."""
    is_inside = False
    for frame, line in traceback.walk_tb(error.__traceback__):
        is_inside = is_inside or frame.f_code.co_name == "<module>"
        if is_inside:
            yield frame, line


def _location(error: BaseException) -> str | None:
    """Return file and line of the user's code that raised; those of a library where none of his code did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}"
    lines = [(frame.f_code.co_filename, line) for frame, line in _frames_of_import(error)]
    own = [one for one in lines if not _is_of_library(one[0])]
    if not lines:
        return None
    file, line = (own or lines)[-1]
    return f"{_short(file)}:{line}"


def _is_of_library(file: str) -> bool:
    return file.startswith("<") or any(Path(file).is_relative_to(folder) for folder in _LIBRARIES)


def _short(file: str) -> str:
    """Return a path, relative where it lies in the current folder."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
