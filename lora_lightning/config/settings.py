"""Settings that the user wrote in config files and flags, as one tree; used to explain errors, not to run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.config.strict_yaml import KeyPath, load_text, read_document
from lora_lightning.paths import resolve

CLASS_PATH, INIT_ARGS, DICT_KWARGS = "class_path", "init_args", "dict_kwargs"
SECTIONS = ("model", "data", "trainer", "guards")
"""Settings that a file may hold, as in `--model model.yaml`."""
SPEC_KEYS = frozenset({CLASS_PATH, INIT_ARGS, DICT_KWARGS})


@dataclass
class Settings:
    """Settings as the user wrote them; later ones override earlier ones.

    Args:
        tree: Nested mappings, as one config file would have them.
        origins: `file, line n` of each key that came from a file, by its path.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Return where the nearest enclosing key of a path was written, as `file, line n`, or an empty text."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return ""


def collect(arguments: Sequence[str]) -> Settings:
    """Collect the settings of a command line, including the config files that it names.

    Args:
        arguments: The command line after the subcommand.

    Raises:
        ConfigError: A config file is missing or is not strict YAML.
    """
    settings = Settings()
    for name, value in _flags(arguments):
        if name == "config":
            _add_config(settings, value)
        else:
            # A text such as that of `--output config.yaml` only names a file.
            is_section = name in SECTIONS and is_file_name(value)
            setting = read_document(value).data if is_section else parse_value(value)
            if name.endswith("+") and "." not in name:  # one more item of a list that a command takes
                setting = [*settings.tree.get(name.removesuffix("+"), []), setting]
            path = set_flag(settings.tree, name.removesuffix("+").split("."), setting)
            for origin in [key for key in settings.origins if key[: len(path)] == path]:
                del settings.origins[origin]
            settings.origins[path] = ""
    return settings


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of the last flag of a name, regardless of config files; None if there is none.

    Example:
        >>> flag_value(["--ckpt_path=last.ckpt", "--config", "run.yaml"], "ckpt_path")
        'last.ckpt'
    """
    return dict(_flags(arguments)).get(name)


def is_config_text(value: str) -> bool:
    """Return whether the value of `--config` is YAML itself, not the name of a file."""
    return "\n" in value or value.lstrip().startswith("{")


def config_path(value: str) -> str:
    """Return the value of `--config` with the path of the file that `config://name.yaml` stands for.

    Raises:
        UserError: No config of this name comes with the package.
    """
    return str(resolve(value)) if value.startswith("config://") else value


def is_file_name(value: object) -> bool:
    """Return whether the value of a whole section, such as `model`, is the name of a file that holds it."""
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def parse_value(text: str) -> Any:  # noqa: ANN401 - whatever the YAML says
    """Read the value of a flag as YAML, or as a plain string if it is not YAML."""
    try:
        return load_text(text)
    except yaml.YAMLError:
        return text


def set_flag(tree: dict[str, Any], keys: Sequence[str], value: Any) -> KeyPath:  # noqa: ANN401 - values out of YAML are of any type
    """Insert the value of a flag such as `--model.method.r` into a tree, under `init_args` if a class is named.

    Returns:
        The path of the value.
    """
    node, path = tree, list[str]()
    for key in keys[:-1]:
        node = _enter(node, key, path)
        child = node.get(key)
        if isinstance(child, str):
            child = {CLASS_PATH: child}
        node[key] = child if isinstance(child, dict) else {}
        node = node[key]
        path.append(key)
    node = _enter(node, keys[-1], path)
    path.append(keys[-1])
    old = node.get(keys[-1])
    if isinstance(old, dict) and CLASS_PATH in old and isinstance(value, str):
        value = {CLASS_PATH: value}
    node[keys[-1]] = _merged(old, value)
    return tuple(path)


def _enter(node: dict[str, Any], key: str, path: list[str]) -> dict[str, Any]:
    """Return the mapping that holds a key of `node`: the node itself, or the `init_args` of its class."""
    if CLASS_PATH not in node or key in SPEC_KEYS:
        return node
    path.append(INIT_ARGS)
    if not isinstance(node.get(INIT_ARGS), dict):
        node[INIT_ARGS] = {}
    inner: dict[str, Any] = node[INIT_ARGS]
    return inner


def _merged(old: Any, new: Any) -> Any:  # noqa: ANN401 - values out of YAML are of any type
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if CLASS_PATH in new and new[CLASS_PATH] != old.get(CLASS_PATH):
        return new  # another class: the old one's arguments no longer count
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _add_config(settings: Settings, value: str) -> None:
    if is_config_text(value):
        settings.tree = _merged(settings.tree, load_text(value))
        return
    value = config_path(value)
    document = read_document(Path(value))
    data = dict(document.data)
    origins = {path: f"{document.source}, line {line}" for path, line in document.lines.items()}
    for key, part in data.items():
        if is_file_name(part):  # jsonargparse looks for it beside the file that names it
            inner = read_document(Path(value).parent / part)
            data[key] = inner.data
            origins.update({(key, *path): f"{inner.source}, line {line}" for path, line in inner.lines.items()})
    settings.tree = _merged(settings.tree, data)
    settings.origins.update(origins)


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each flag; a flag without a value is left to the parser."""
    waiting: str | None = None
    for argument in arguments:
        if waiting is not None and not argument.startswith("--"):
            yield waiting, argument
            waiting = None
        elif argument.startswith("--"):
            name, has_value, value = argument[2:].partition("=")
            if has_value:
                yield name, value
            else:
                waiting = name
        elif argument.startswith("-c"):
            waiting, value = ("config", "") if argument == "-c" else (None, argument[2:].removeprefix("="))
            if value:
                yield "config", value
