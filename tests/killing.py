"""Run code in a forked process, and kill it just before its n-th change of the disk."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR
FAILED = 3


def run_forked(act: Callable[[], object]) -> int:
    """Run something in a fork of this process, and return its status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            act()
            status = 0
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            print(text, file=sys.__stderr__, flush=True)  # `act` may have closed sys.stderr
        finally:  # whatever is raised, the fork must not continue with the other tests
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_before_change(number: int, act: Callable[[], object]) -> bool:
    """Run something in a fork that gets SIGKILL just before its change of the disk of a number, counted from 0.

    Returns:
        Whether it came that far.
    """
    status = run_forked(lambda: (sys.addaudithook(_Killer(number)), act()))
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


class _Killer:
    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_open = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not (event in CHANGES or is_open):
            return
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
