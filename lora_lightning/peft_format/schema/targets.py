"""Common entries of the configs of PEFT's adapters: base, copies and target modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from lora_lightning.adapters.patterns import compile_pattern, match_start
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.peft_format.names import CONFIG_NAME


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Entries in the config of every type of adapter.

    Args:
        base: Name of the base model, or None.
        modules_to_save: Endings of the paths of modules trained as copies.
        task_type: Such as `CAUSAL_LM`, or None.
    """

    base: str | None
    modules_to_save: list[str]
    task_type: str | None


@dataclass(frozen=True, kw_only=True)
class TargetConfig(PeftConfig):
    """Entries in the config of a type that adapts modules by their names.

    Args:
        target_modules: Path suffixes, a regular expression for whole paths, `all-linear`, or None if the file does not
            name them.
        exclude_modules: The same, for excluded modules.
        layers_to_transform: Layer indices, or None for all.
        layers_pattern: Names of the lists of layers, or empty for any.
    """

    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None
    layers_pattern: list[str]

    def takes(self, path: str) -> bool:
        """Return whether a module is a target by PEFT's rules, for targets that are a list or a regular expression."""
        if self.exclude_modules and matches(path, self.exclude_modules):
            return False
        if any(match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save):
            return False
        targets = self.target_modules
        if targets is None or not matches(path, targets):
            return False
        # PEFT asks for the layer neither with a regular expression nor where a target is a whole path.
        if not self.layers_to_transform or isinstance(targets, str) or path in targets:
            return True
        return self._layer(path) in self.layers_to_transform

    def _layer(self, path: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\." for name in self.layers_pattern] or [r".*?\.[^.]*\."]
        found = (match(rf"{pattern}(\d+)\.", path) for pattern in patterns)
        return next((int(one[1]) for one in found if one), None)

    def check_patterns(self, source: str, others: Iterable[str] = ()) -> None:
        """Refuse malformed regular expressions, before any of them is used.

        Args:
            source: The config, for the message.
            others: Further expressions.

        Raises:
            CheckpointError: One is malformed.
        """
        texts = [*others, *self.modules_to_save, *self.layers_pattern]
        texts += [text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        for text in texts:
            try:
                compile_pattern(text, source)
            except ConfigError as error:
                raise CheckpointError(str(error)) from error


def in_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config with the layers and their patterns as lists."""
    layers, patterns = values["layers_to_transform"], values["layers_pattern"]
    return {
        **values,
        "layers_to_transform": [layers] if isinstance(layers, int) else layers or None,
        "layers_pattern": [patterns] if isinstance(patterns, str) and patterns else list(patterns or []),
    }


def match(pattern: str, path: str, *, whole: bool = False) -> regex.Match[str] | None:
    """Match a pattern of a file at the start of a path, with a time limit, since the file is not trusted.

    Raises:
        CheckpointError: It is malformed, or takes too long.
    """
    try:
        return match_start(pattern, path, CONFIG_NAME, whole=whole)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def ends_like(path: str, pattern: str) -> bool:
    """Return whether the last parts of a path match a pattern."""
    return match(rf"(.*\.)?({pattern})$", path) is not None


def matches(path: str, targets: list[str] | str) -> bool:
    """Return whether a path ends with one of a list of names, or matches a regular expression as a whole."""
    if isinstance(targets, str):
        return match(targets, path, whole=True) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)
