"""Candidates for the next word of a command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_lightning.commands import LIGHTNING_COMMANDS, all_commands
from lora_lightning.commands._completion.scripts import SHELLS
from lora_lightning.commands._completion.source import (
    Arguments,
    Option,
    options_of_class,
    options_of_command,
    options_of_trainer,
)
from lora_lightning.public import classes_of, nameable, table

FILES = ":files"
"""Stands for the files and folders, which the shell itself completes."""
_OF_LIGHTNING = (
    Option("config", "YAML file with settings."),
    Option("ckpt_path", "Checkpoint to resume from or to evaluate."),
    Option("seed_everything", "Seed of weights, order and dropout."),
    Option("weights_only", "Whether a checkpoint is read as weights alone.", ("true", "false")),
    Option("print_config", "Print the settings with all defaults, and end."),
    Option("help", "The usual settings; `--help all`: every setting."),
)
_OF_EVALUATIONS = {
    "validate": (Option("verbose", "Print the metrics.", ("true", "false")),),
    "test": (Option("verbose", "Print the metrics.", ("true", "false")),),
    "predict": (
        Option("output", "File of the predictions: .csv, .jsonl or .parquet."),
        Option("return_predictions", "Keep the predictions in memory.", ("true", "false")),
    ),
}
"""What only these subcommands take, beside `untrained`."""
_SECTIONS = {"model": "tasks", "data": "data"}
_USUAL_METHOD = "LoRA"


@dataclass
class CommandLine:
    """The words after the program's name; the last one is being typed.

    Args:
        words: The words, at least one, which may be empty.
    """

    words: Sequence[str]

    def candidates(self) -> list[tuple[str, str]]:
        """Return the completions of the last word, each with a short description."""
        *before, current = self.words
        if not before:
            return _starting(current, [*all_commands().items(), ("--help", "List the commands.")])
        if before[-1] == "=":  # bash splits at it
            before = before[:-1]
        elif current.startswith("--") and "=" in current:
            flag, _, value = current.partition("=")
            return [(one if one == FILES else f"{flag}={one}", text) for one, text in self._values(flag, value)]
        elif current == "=":
            return self._values(before[-1], "")
        if before[0] == "completion" and len(before) == 1:
            return _starting(current, [(shell, f"The script for {shell}.") for shell in SHELLS])
        if before[-1].startswith("--") and not current.startswith("-"):
            return self._values(before[-1], current)
        return self._flags(current)

    def _flags(self, current: str) -> list[tuple[str, str]]:
        """Return the flags that start with the current word; a group is one candidate until a dot is typed."""
        found: dict[str, str] = {}
        for name, option in self.options.items():
            flag = f"--{name}"
            depth = current.count(".")
            stem = ".".join(flag.split(".")[: depth + 1])
            is_group = stem != flag
            if is_group and stem + "." not in found:
                found[stem + "."] = f"Settings of {stem.removeprefix('--')}."
            elif not is_group:
                found[flag] = option.text
        return _starting(current, list(found.items()))

    def _values(self, flag: str, current: str) -> list[tuple[str, str]]:
        """Return the values that a flag may have."""
        name = flag.removeprefix("--").rstrip("+").replace("-", "_")
        classes = self._classes_for(name)
        if classes:
            return _starting(current, [(one, "") for one in classes])
        option = self.options.get(name)
        if option is not None and option.choices:
            return _starting(current, [(one, "") for one in option.choices])
        return [(FILES, "")]

    def _classes_for(self, name: str) -> list[str]:
        if name == "help":
            return ["all", *(one for one in table().modules if one[0].isupper())]
        if name in _SECTIONS:
            return nameable(_SECTIONS[name])
        if name == "model.method" or (name == "methods" and self.words[0] == "compare"):
            return classes_of("methods")
        if name == "trainer.callbacks":
            return nameable("callbacks")
        return []

    @cached_property
    def options(self) -> Arguments:
        """The options of the command, those of the classes that are chosen among them."""
        command = self.words[0]
        if command in LIGHTNING_COMMANDS:
            found = {one.name: one for one in _OF_LIGHTNING}
            found |= {one.name: one for one in _OF_EVALUATIONS.get(command, ())}
            if command != "fit":
                found["untrained"] = Option("untrained", "Use a model whose head was never trained.")
            found |= _below("trainer", options_of_trainer()) | _below("guards", options_of_class("Guards"))
            sections = list(_SECTIONS)
        elif command in table().commands:
            own = options_of_command(command)
            found = {"config": _OF_LIGHTNING[0], **own, "help": Option("help", "Every setting.")}
            sections = [name for name in _SECTIONS if name in own]
        else:
            return {}
        for section in sections:
            found[section] = Option(section, f"The class: one of {_SECTIONS[section]}.")
            for cls in self._chosen(section):
                found |= _below(section, options_of_class(cls))
        if "model" in sections:
            found |= self._of_parts()
        return found

    def _of_parts(self) -> Arguments:
        """Return the settings of what stands inside a task."""
        methods = self._given("model.method") or [_USUAL_METHOD]
        found: Arguments = {}
        for method in methods:
            found |= _below("model.method", options_of_class(method))
        found |= _below("model.optim", options_of_class("Optim"))
        return found | _below("model.quantization", options_of_class("Quantization"))

    def _chosen(self, section: str) -> list[str]:
        """Return the class of a section that the line or its configs name, else all classes."""
        return self._given(section) or nameable(_SECTIONS[section])

    def _given(self, name: str) -> list[str]:
        """Return the class that the line names for a setting, else the one of its config files."""
        values = [value for flag, value in self._pairs() if flag == f"--{name}"]
        if values:
            return [values[-1].rpartition(".")[2]]
        files = [value for flag, value in self._pairs() if flag in ("--config", "-c")]
        named = [found for found in (_class_in(file, name.split(".")) for file in reversed(files)) if found]
        return named[:1]

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Iterate over the flags with their values, however they are written."""
        words = [word for word in self.words[:-1] if word != "="]
        for index, word in enumerate(words):
            flag, has_value, value = word.partition("=")
            if has_value:
                yield flag, value
            elif word.startswith("-") and index + 1 < len(words):
                yield word, words[index + 1]


def _starting(current: str, candidates: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(word, text) for word, text in candidates if word.startswith(current)]


def _below(section: str, options: Arguments) -> Arguments:
    return {f"{section}.{name}": option for name, option in options.items()}


def _class_in(file: str, keys: Sequence[str]) -> str | None:
    """Return the short name of the class that a config file names for a setting, or None."""
    import yaml  # takes a while, and most lines name no file

    try:
        node: Any = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    for key in keys:
        node = node.get("init_args", node) if isinstance(node, dict) else None
        node = node.get(key) if isinstance(node, dict) else None
    found = node.get("class_path") if isinstance(node, dict) else node
    return found.rpartition(".")[2] if isinstance(found, str) else None
