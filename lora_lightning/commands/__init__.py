"""The commands of `lora-lightning` beside Lightning's own, one a file.

A new command is a file here, named as the command, that holds a function of the same name. Its parameters become the
options, its docstring the help; return an int to set the exit status. Nothing else is to be registered. Files that
start with an underscore are no commands.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIGHTNING_COMMANDS = {
    "fit": "Train, with checkpoints and validation.",
    "validate": "Compute the validation metrics of a checkpoint.",
    "test": "Compute the test metrics of a checkpoint.",
    "predict": "Compute predictions with a checkpoint.",
}
"""What LightningCLI runs, and the line that the help shows for it."""


def own_commands() -> dict[str, str]:
    """Return the commands of this folder with the first line of their help, without importing them."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {file.stem.replace("_", "-"): _summary(file) for file in files}


def all_commands() -> dict[str, str]:
    """Return every command with the first line of its help."""
    return {**LIGHTNING_COMMANDS, **own_commands()}


def load_command(name: str) -> Callable[..., Any]:
    """Import one of our own commands and return its function."""
    module_name = name.replace("-", "_")
    module = importlib.import_module(f"{__name__}.{module_name}")
    function: Callable[..., Any] = getattr(module, module_name)
    return function


def _summary(file: Path) -> str:
    """Return the first line of the docstring of the function that a command's file is named after."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == file.stem:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""
