"""The commands of `lora-lightning` besides Lightning's own, one per file.

A new command is a file here, named like the command, with a function of the same name; `scripts/public` then writes its
line into the static table. The parameters become the options and the docstring the help; return an int to set the exit
status. Files that start with an underscore are not commands.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lora_lightning.public import table

LIGHTNING_COMMANDS = {
    "fit": "Train, with checkpoints and validation.",
    "validate": "Compute the validation metrics of a checkpoint.",
    "test": "Compute the test metrics of a checkpoint.",
    "predict": "Compute predictions with a checkpoint.",
}
"""The subcommands of LightningCLI, with their lines in the help."""


def all_commands() -> dict[str, str]:
    """Return every command with the first line of its help, without importing them."""
    return {**LIGHTNING_COMMANDS, **table().commands}


def load_command(name: str) -> Callable[..., Any]:
    """Import one of our own commands and return its function."""
    module_name = name.replace("-", "_")
    module = importlib.import_module(f"{__name__}.{module_name}")
    function: Callable[..., Any] = getattr(module, module_name)
    return function
