"""What a logger's package refuses is told in one sentence; bugs keep their traceback."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest

import lora_lightning
from lora_lightning.checks.trainer_errors import mistake_of_settings
from lora_lightning.errors import ConfigError, DataError

LIGHTNING = Path(L.__file__).parent
LOGGER = LIGHTNING / "pytorch/loggers/wandb.py"
PACKAGE = Path("/site-packages/wandb/sdk/wandb_login.py")
RUN_LOGGER = Path(lora_lightning.__file__).parent / "callbacks/run_logger.py"


class UsageError(Exception):
    """As the package of a logger names its own."""


def raised_through(error: Exception, *files: Path) -> Exception:
    """Return an error that the last of some files raised, called by the one before it, and so on."""

    def call() -> None:
        raise error

    for file in reversed(files):
        names: dict[str, Callable[[], None]] = {"inner": call} if file is not files[-1] else {}
        body = "inner()" if names else "raise error"
        scope = {**names, "error": error}
        exec(compile(f"def call():\n    {body}", str(file), "exec"), scope)
        call = scope["call"]
    with pytest.raises(type(error)) as caught:
        call()
    return caught.value


def test_a_logger_that_cannot_start() -> None:
    error = raised_through(UsageError("No API key configured.\nUse `wandb login` to log in."), LOGGER, PACKAGE)
    told = mistake_of_settings(error)
    assert isinstance(told, ConfigError)
    assert str(told) == (
        "A logger of trainer.logger ends the run: No API key configured. Use `wandb login` to log in. "
        "Mend that, or leave this logger out."
    )


def test_a_package_that_is_missing() -> None:
    error = raised_through(ModuleNotFoundError("no wandb", name="wandb.sdk"), LOGGER)
    assert "pip install wandb" in str(mistake_of_settings(error))


@pytest.mark.parametrize(
    ("error", "files"),
    [
        (UsageError("x"), [PACKAGE]),
        (IndexError("x"), [LOGGER, RUN_LOGGER]),
        (IndexError("x"), [LOGGER]),
        (DataError("x"), [LOGGER, PACKAGE]),
        (OSError(errno.ENOSPC, "No space left on device"), [LOGGER, PACKAGE]),
    ],
    ids=["no logger", "our logger", "Lightning's code", "told already", "told as the disk's"],
)
def test_other_errors_are_left_alone(error: Exception, files: list[Path]) -> None:
    assert mistake_of_settings(raised_through(error, *files)) is None
