"""Runs the code of a page of the documentation, as a reader would: files are written, commands and scripts are run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"# (\w+\.(?:py|yaml))\n")
SETTINGS = ("set -euo pipefail", "shopt -s inherit_errexit")
RUN = ("python", "sh")


@dataclass(frozen=True)
class Block:
    """A block of code: `language` is python, sh or yaml; `name` is the file that it shows, empty if it is to be run."""

    language: str
    code: str
    name: str = ""


class PageError(AssertionError):
    """A block of a page failed."""


def blocks_of(text: str) -> list[Block]:
    """Return what a page shows and runs. Consecutive blocks of Python are one script; other kinds are left out.

    A block whose first line is a comment with a file's name is that file.
    """
    blocks: list[Block] = []
    for language, code in FENCE.findall(text):
        named = FILE_NAME.match(code)
        if named is not None:
            blocks.append(Block(language, code, named.group(1)))
            continue
        if language not in RUN:
            continue
        before = blocks[-1] if blocks else Block("", "")
        if language == "python" and before.language == "python" and not before.name:
            blocks[-1] = Block(language, f"{before.code}\n{code}")
        else:
            blocks.append(Block(language, code))
    return blocks


def run_page(text: str, folder: Path, cache: Path) -> str:
    """Run the blocks of a page in a folder, and return what they printed.

    Args:
        text: The page.
        folder: Where files are written and commands run.
        cache: Cache folder of the library.

    Raises:
        PageError: A block ended with a status other than 0.
    """
    return "".join(_run(block, folder, cache) for block in blocks_of(text))


def _run(block: Block, folder: Path, cache: Path) -> str:
    if block.name:
        (folder / block.name).write_text(block.code, encoding="utf-8")
        return ""
    shell = ["bash", "-c", "\n".join([*SETTINGS, block.code])]
    command = [sys.executable, "-c", block.code] if block.language == "python" else shell
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(_environment(cache)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise PageError(f"status {done.returncode} of\n{block.code}\n{done.stdout}")
    return done.stdout


def _environment(cache: Path) -> Iterator[tuple[str, str]]:
    """Yield the environment: all cores for each command, and the commands of this Python first."""
    yield from os.environ.items()
    yield "PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    yield "OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))
    yield "OMP_WAIT_POLICY", "passive"  # threads that spin while they wait cost the most beside other work
    yield "HF_HUB_OFFLINE", "1"
    yield "LORA_LIGHTNING_CACHE", str(cache)
