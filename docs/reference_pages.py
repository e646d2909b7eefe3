"""The pages of the reference that come from the code: every public name, and every setting with type and default."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import SUPPRESS, ArgumentParser

from lora_lightning.commands import load_command
from lora_lightning.public import classes_of, find, table

ROOMS = {
    "tasks": "Tasks",
    "methods": "Methods",
    "optim": "Optimization",
    "backbones": "Quantization",
    "data": "Data modules",
    "callbacks": "Callbacks",
}
"""The packages whose classes a config may name, and their titles."""

HELPERS = {"StepOutput", "TokenSums"}
"""Public classes without settings: what a step returns."""

EXTENSION_POINTS = (
    "lora_lightning.adapters.Adapter",
    "lora_lightning.adapters.ForwardAdapter",
    "lora_lightning.adapters.InputAdapter",
    "lora_lightning.adapters.OutputAdapter",
    "lora_lightning.adapters.Method",
    "lora_lightning.adapters.TargetedMethod",
    "lora_lightning.adapters.Role",
)
"""What methods of your own build on."""


@dataclass(frozen=True)
class Setting:
    """One line of a table of settings.

    Args:
        name: The name in a config.
        type: The type, as Python writes it.
        default: The default, as YAML writes it; empty for a required setting.
        text: What it means.
    """

    name: str
    type: str
    default: str
    text: str


def write_all(folder: Path) -> None:
    """Write all generated pages into a folder; files that are up to date keep their time.

    Args:
        folder: The folder, created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"api.rst": api_page(), "commands.md": commands_page()}
    for room, title in ROOMS.items():
        pages[f"{room}.md"] = settings_page(room, title)
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for page in (folder / "names").glob("*.rst"):  # of names that are gone, which Sphinx would read too
        if f"   {page.stem}\n" not in pages["api.rst"]:
            page.unlink()


# Every public name.


def api_page() -> str:
    """Return the page that lists every public name, by package, for autosummary."""
    by_package: dict[str, list[str]] = {}
    for name, module in table().modules.items():
        by_package.setdefault(module.split(".")[1], []).append(f"{module}.{name}")
    parts = [_title("Every public name", "=")]
    for package, names in by_package.items():
        parts += [_title(ROOMS.get(package, f"lora_lightning.{package}"), "-"), _autosummary(names)]
    parts += [_title("Building blocks of a method", "-"), _autosummary(EXTENSION_POINTS)]
    parts += [_title("Errors", "-"), _autosummary(error_names())]
    return "\n".join(parts)


def error_names() -> list[str]:
    """Return the paths of the library's exceptions."""
    from lora_lightning import errors

    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    return [f"lora_lightning.errors.{cls.__name__}" for cls in found if cls.__module__ == errors.__name__]


def _autosummary(names: Iterable[str]) -> str:
    lines = "\n".join(f"   {name}" for name in names)
    return f".. autosummary::\n   :toctree: names\n   :nosignatures:\n\n{lines}\n"


def _title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


# Every setting.


def settings_page(room: str, title: str) -> str:
    """Return the page with the settings of each class of a package.

    Args:
        room: The package, such as `tasks`.
        title: Heading of the page.
    """
    parts = [f"# {title}: every setting\n"]
    for name in classes_of(room):
        if name in HELPERS:
            continue
        cls = find(name)
        parts += [f"## {name}\n", f"{_first_sentence(cls)}\n", _table(settings_of(cls))]
    return "\n".join(parts)


def commands_page() -> str:
    """Return the page with the arguments of each command that is not Lightning's own."""
    parts = ["# Commands: every argument\n", _COMMANDS_INTRODUCTION]
    for name, summary in table().commands.items():
        function = load_command(name)
        parts += [f"## {name}\n", f"{summary}\n", _table(settings_of(function))]
    return "\n".join(parts)


_COMMANDS_INTRODUCTION = """
`fit`, `validate`, `test` and `predict` take the settings of a task, a data module, the callbacks and Lightning's
`Trainer`; `lora-lightning fit --help all` lists them. The other commands take what this page lists. `--debug` shows the
traceback of a mistake, and `--strict` restricts what a config may import; both go anywhere on the command line.
"""


def settings_of(source: Callable[..., Any]) -> list[Setting]:
    """Return what a class or function may be called with, those of its base classes included.

    Args:
        source: The class or function.
    """
    parser = ArgumentParser(exit_on_error=False)
    if isinstance(source, type):
        parser.add_class_arguments(source)
    else:
        parser.add_function_arguments(source)
    actions = [one for one in parser._actions if one.dest != "help" and one.default is not SUPPRESS]
    return [_setting(one) for one in actions]


def _setting(action: Any) -> Setting:  # noqa: ANN401 - argparse's actions have no public type
    default = "" if action.required else _default(action.default)
    hint = getattr(action, "_typehint", None) or action.type
    return Setting(action.dest, _type(hint), default, _one_line(action.help or ""))


def _default(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return str(value)


def _type(hint: object) -> str:
    """Return a type without the modules of its parts."""
    if hint is None:
        return ""
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint.__name__
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_type(one) for one in typing.get_args(hint)).replace("NoneType", "None")
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(hint)).replace("NoneType", "None")


def _first_sentence(cls: type) -> str:
    text = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return _escaped(" ".join(text.split()))


def _one_line(text: str) -> str:
    return " ".join(str(text).split()).replace("``", "`")


def _table(settings: list[Setting]) -> str:
    if not settings:
        return "It has no settings.\n"
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for one in settings:
        default = f"`{one.default}`" if one.default else "required"
        cells = (f"`{one.name}`", f"`{one.type}`", default, _escaped(one.text))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Escape what Markdown reads as emphasis or markup outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", part) for part in parts)
