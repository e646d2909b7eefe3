"""The public names and the commands, out of the static table `__init__.pyi`; what it names is not imported.

The table has a line for each name, `from <module> import <name> as <name>`, which type checkers and editors read too,
and a line for each command, `# command <name>: <first sentence of its help>`. `scripts/public` writes it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_COMMAND = "# command "
_NOT_TO_NAME = frozenset({"AdapterTask", "Guards", "PerTokenTask", "StepOutput", "TokenSums"})
"""Public classes that no config names: bases, what steps return, and a group of settings."""


@dataclass(frozen=True)
class Table:
    """What the static table says.

    Args:
        modules: The module that defines each public name, by name.
        commands: The first sentence of each command's help, by the command's name.
    """

    modules: dict[str, str]
    commands: dict[str, str]


@cache
def table() -> Table:
    """Read the static table."""
    modules: dict[str, str] = {}
    commands: dict[str, str] = {}
    for line in Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8").splitlines():
        if line.startswith("from "):
            _, module, _, name, _, _ = line.split()
            modules[name] = module
        elif line.startswith(_COMMAND):
            name, _, summary = line.removeprefix(_COMMAND).partition(": ")
            commands[name] = summary
    return Table(modules, commands)


def classes_of(room: str) -> list[str]:
    """Return the names of the public classes of one package of the library, sorted.

    Args:
        room: Such as `methods` or `tasks`.

    Example:
        >>> classes_of("data")[0]
        'InstructionData'
    """
    prefix = f"lora_lightning.{room}."
    return sorted(name for name, module in table().modules.items() if module.startswith(prefix) and name[0].isupper())


def nameable(room: str) -> list[str]:
    """Return the names of the public classes of one package that a config may name where one of its kind is expected.

    Args:
        room: `methods`, `tasks`, `data` or `callbacks`.

    Example:
        >>> nameable("tasks")[0]
        'CausalLM'
    """
    return [name for name in classes_of(room) if name not in _NOT_TO_NAME]


def find(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import what a public name stands for.

    Raises:
        KeyError: There is no such name.
    """
    return getattr(importlib.import_module(table().modules[name]), name)


def import_classes(room: str) -> dict[str, Any]:
    """Import the public classes of one package of the library.

    Args:
        room: Such as `methods` or `tasks`.

    Returns:
        The classes by name.
    """
    return {name: find(name) for name in classes_of(room)}
