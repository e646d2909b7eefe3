"""Run a command as a user does, and read what it says."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.__main__ import main
from tests.faults.bench import FIT

PREFIX = "lora-lightning: error: "


def mistake(capsys, *arguments: str, leaves: bool = False) -> str:
    """Run a command that must fail before training, and return its only line of error.

    Args:
        capsys: pytest's fixture.
        *arguments: The command line.
        leaves: Whether the folder of a run may be left.
    """
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    status = main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert status == 2, lines
    [error] = [line for line in lines if line.startswith(PREFIX)]
    assert lines[-1] == error
    assert not any("Traceback" in line for line in lines)
    assert len(error) < 600
    assert not list(Path("runs").rglob("*.ckpt"))
    if not leaves:
        assert [path for path in sorted(Path().rglob("*")) if path.name != "__pycache__"] == before
    return error.removeprefix(PREFIX)


def works(capsys, *arguments: str) -> str:
    """Run a command that must succeed, and return what it writes to stderr."""
    capsys.readouterr()
    status = main(list(arguments))
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.err


def fit(*arguments: str) -> list[str]:
    """Return the command line of a good run with further settings."""
    return [*FIT, *arguments]
