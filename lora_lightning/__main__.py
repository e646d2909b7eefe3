"""The command `lora-lightning`: finds the subcommand, and turns mistakes into one line and an exit status."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lora_lightning import __version__
from lora_lightning.commands import LIGHTNING_COMMANDS, all_commands, load_command
from lora_lightning.errors import ConfigError, UserError, trouble_of_disk
from lora_lightning.imports import failure_of_import, import_module, is_failure_of_import
from lora_lightning.run.quiet import hide_bars
from lora_lightning.trust import be_strict, check_module

PROG = "lora-lightning"
OK, BUG, MISTAKE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 1, 2, 130, 141, 143

_ASKED = frozenset({"-h", "--help", "help", "__complete", "completion", "schema"})
"""Words of command lines that only print something."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    A mistake of the user (a `UserError`, or Lightning's `MisconfigurationException`) ends in one line on stderr and
    status 2; `--debug`, anywhere on the line, shows its traceback as well. Any other exception is a bug and is raised.
    `--strict`, anywhere on the line, lets settings and checkpoints name classes of an allowed list alone.
    `--import my_module`, anywhere on the line, imports a module whose classes a checkpoint names.

    Args:
        argv: The words after the program's name; None takes those of this process.

    Returns:
        0, 2 after a mistake, 75 after the loss of another rank, 128 plus the number of a signal (130 after Ctrl-C, 141
        where the reader of its output has ended), or what the command returned.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debugging = "--debug" in arguments
    is_strict = "--strict" in arguments
    arguments = [argument for argument in arguments if argument not in ("--debug", "--strict")]
    try:
        if is_strict:
            be_strict()
        return run(_import_modules(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        if not is_failure_of_import(stop):
            return _status(stop)
        print(f"{PROG}: error: {failure_of_import(stop)}", file=sys.stderr)  # a program where a module was expected
        return MISTAKE
    except BrokenPipeError:
        if not _ASKED.intersection(arguments):
            raise
        # The reader has ended first, as in `--help | head`; the interpreter must not write the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        if is_debugging:
            import traceback

            traceback.print_exc()
        print(f"{PROG}: error: {' '.join(mistake.split())}", file=sys.stderr)
        return getattr(error, "status", MISTAKE)


def _import_modules(arguments: list[str]) -> list[str]:
    """Import the modules that `--import` names, and return the other words.

    A checkpoint imports nothing by itself, so a task or method of the user's own must be there before.

    Raises:
        ConfigError: A module is not found, has a name that strict mode does not allow, or none is named.
    """
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        option, has_value, value = word.partition("=")
        if option != "--import":
            rest.append(word)
            continue
        name = value if has_value else next(words, "")
        if not name or name.startswith("-"):
            raise ConfigError("--import needs the name of a module, such as `--import my_methods`.")
        _import_module(name)
    return rest


def _import_module(name: str) -> None:
    check_module(name, "--import")
    try:
        import_module(name)
    except ConfigError as error:
        raise ConfigError(f"--import {name}: {error}") from error


def run(arguments: list[str]) -> int:
    """Run the command that the first word names.

    Raises:
        ConfigError: There is no such command.
    """
    if not arguments:
        raise ConfigError(f"a command is needed: {', '.join(all_commands())} (see {PROG} --help).")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return OK
    if name == "--version":
        print(f"{PROG} {__version__}")
        return OK
    if name == "__complete":  # asked by the scripts of `completion`, at each TAB
        print_candidates(rest)
        return OK
    commands = all_commands()
    if name not in commands:
        from lora_lightning.config.right_words.foreign_names import COMMANDS
        from lora_lightning.wording import suggestion

        kind = "the command comes first, but got" if name.startswith("-") else "unknown command"
        meant = COMMANDS.get(name.lower())
        hint = f"use `{meant}`" if meant else suggestion(name, commands, "commands")
        raise ConfigError(f"{kind} `{name}`; {hint}")
    if name == "completion" and len(rest) == 1 and not rest[0].startswith("-"):
        load_command(name)(rest[0])  # shells run it as they start: the parser would take seconds
        return OK
    topic, rest = _help_topic(rest)
    if topic is not None and (name in LIGHTNING_COMMANDS or topic not in ("", "all")) and topic != "all":
        print(_help_on(topic, name, commands[name]))
        return OK
    if name in LIGHTNING_COMMANDS:
        from lora_lightning.cli import run_lightning

        run_lightning(name, rest)
        return OK
    from lora_lightning.config.functions import call_from_arguments

    result = call_from_arguments(f"{PROG} {name}", load_command(name), rest)
    return result if isinstance(result, int) else OK


def print_candidates(words: list[str]) -> None:
    """Print what may come next on a command line, a candidate a line, each with a few words behind a tab."""
    from lora_lightning.commands._completion.engine import CommandLine

    for candidate, text in CommandLine(words or [""]).candidates():
        print(f"{candidate}\t{text}" if text else candidate)


def help_text() -> str:
    """Return the overview of all commands."""
    lines = [f"  {name:<10} {summary}" for name, summary in all_commands().items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [--config FILE] [--name value ...]",
            "",
            "Fine-tune adapters on frozen backbones.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROG} COMMAND --help shows a command's usual settings, {PROG} fit --help all every setting.",
            "--version shows the version; --debug shows tracebacks.",
            "--import MODULE imports a module whose classes a checkpoint names, such as a method of your own.",
            "--strict imports nothing that a config or checkpoint names, but from an allowed list (see SECURITY.md).",
        ]
    )


def _help_topic(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the word after `--help`, empty if there is none and None without `--help`; and the line without it.

    Example:
        >>> _help_topic(["--config", "a.yaml", "--help", "all"])
        ('all', ['--config', 'a.yaml', '--help'])
    """
    position = next((index for index, word in enumerate(arguments) if word in ("-h", "--help")), None)
    if position is None:
        return None, arguments
    rest = arguments[position + 1 :]
    if not rest or rest[0].startswith("-"):
        return "", arguments
    return rest[0], [*arguments[: position + 1], *rest[1:]]


def _help_on(topic: str, command: str, summary: str) -> str:
    """Return the short help of a subcommand, or with a topic the settings of the class of this name."""
    if topic:
        from lora_lightning.config.class_help import class_help

        return class_help(topic)
    from lora_lightning.config.short_help import short_help

    return short_help(command, summary)


def _mistake(error: BaseException) -> str | None:
    """Return what to tell the user, or None for a bug.

    A full or read-only disk may show first where a checkpoint was to be saved, and again while the run is wound up:
    then the first says more. Lightning's class is looked up only where Lightning is imported.
    """
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    misconfiguration = getattr(exceptions, "MisconfigurationException", UserError)
    if isinstance(error, (UserError, misconfiguration)):
        return str(error)
    trouble = trouble_of_disk(error)
    if trouble is None:
        return None
    first = error.__context__ and _mistake(error.__context__)
    return first or f"{getattr(error, 'filename', None) or 'a file'} could not be read or written: {trouble}."


def _status(stop: SystemExit) -> int:
    """Return the exit status of a SystemExit; Lightning answers Ctrl-C with one whose status is 1."""
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    if type(stop).__name__ == "SIGTERMException":  # Lightning's, which carries no status
        return TERMINATED
    if stop.code is None:
        return OK
    return stop.code if isinstance(stop.code, int) else MISTAKE


def find_modules_of_folder() -> None:
    """Let classes in files of the current folder be named, as `python -m lora_lightning` does.

    The folder comes last, so that a file there never stands in for an installed module. `python -P` keeps it out.
    """
    here = str(Path.cwd())
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.append(here)


def script() -> NoReturn:
    """Run the command line of this process and end it with the exit status.

    One rank of several ends itself: in torch 2.13 a thread of gloo may drop the tensors of its last broadcast while the
    interpreter ends, which aborts a run that has succeeded (`terminate called without an active exception`).
    """
    hide_bars()
    find_modules_of_folder()
    status = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(status)
    # What the interpreter does at its end, but for taking itself down.
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, such as those of loggers
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    script()
