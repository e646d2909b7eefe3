"""Strict mode: which classes a config, a checkpoint or an adapter may name; nothing else is imported on their word.

The list comes from the environment or from the command line, never from a file. Once a process is strict it stays so.
"""

from __future__ import annotations

import os

from lora_lightning.errors import ConfigError

VARIABLE = "LORA_LIGHTNING_ALLOWED"
LIBRARY = "lora_lightning"

USUAL = (
    "torch.optim",
    "bitsandbytes.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.csv_logs",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.tensorboard",
)
"""What `--strict` allows beside this library where the environment names no list."""


def be_strict() -> None:
    """Turn strict mode on for this process and those that it starts, with the usual list unless one is set."""
    os.environ.setdefault(VARIABLE, ",".join(USUAL))
    allowed_prefixes()


def allowed_prefixes() -> tuple[str, ...] | None:
    """Return the import paths below which classes may be named, or None outside strict mode.

    Raises:
        ConfigError: The environment's list is empty or malformed.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    prefixes = [part.strip() for part in text.split(",") if part.strip()]
    wrong = next((one for one in prefixes if not all(word.isidentifier() for word in one.split("."))), None)
    if not prefixes or wrong is not None:
        raise ConfigError(
            f"The environment variable {VARIABLE} must list import paths, such as torch.optim,my_package.tasks, and "
            f"{'is empty' if wrong is None else f'holds {wrong!r}'}; set it, or unset it to allow every class."
        )
    return tuple(dict.fromkeys((LIBRARY, *prefixes)))


def check_import(path: str, source: str) -> None:
    """Refuse, in strict mode, a class that is not on the list; call it before importing anything.

    Args:
        path: Import path of the class.
        source: What names it, for the message.

    Raises:
        ConfigError: It is not allowed.
    """
    if not is_allowed(path):
        raise ConfigError(refusal(path, source))


def check_module(name: str, source: str) -> None:
    """Refuse, in strict mode, to import a module that is not on the list as a whole.

    Names without a dot are checked too: a module of this name is imported, unlike a class's short name.

    Args:
        name: Import path of the module.
        source: What names it, for the message.

    Raises:
        ConfigError: It is not allowed.
    """
    if not _is_below(name, allowed_prefixes()):
        raise ConfigError(refusal(name, source))


def is_allowed(path: str) -> bool:
    """Return whether a class may be named; outside strict mode all may. A short name (no dot) imports nothing."""
    return "." not in path or _is_below(path, allowed_prefixes())


def _is_below(path: str, prefixes: tuple[str, ...] | None) -> bool:
    return prefixes is None or any(path == one or path.startswith(f"{one}.") for one in prefixes)


def refusal(path: str, source: str) -> str:
    """Return the sentence that refuses a class."""
    known = ", ".join(allowed_prefixes() or ())
    return (
        f"{source} names {path}, which strict mode does not allow: it takes classes from {known} only. "
        f"If you trust it, add it to the environment variable {VARIABLE}."
    )
