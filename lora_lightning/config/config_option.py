"""The option `--config`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # public, though not in its `__all__`

from lora_lightning.config.settings import config_path, is_config_text, parse_value
from lora_lightning.config.strict_yaml import read_document
from lora_lightning.errors import ConfigError


class StrictConfigFile(ActionConfigFile):
    """The option `--config`, which reads only strict YAML; `config://name.yaml` is a config of the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ANN401 - argparse's own signature
        """Check the file, then let jsonargparse read it.

        Raises:
            ConfigError: It is missing or is not strict YAML.
        """
        path = config_path(values)
        check_config(path)
        super().__call__(parser, cfg, path, option_string)  # type: ignore[no-untyped-call]  # jsonargparse leaves it untyped


def check_config(value: str) -> None:
    """Refuse a value of `--config` that is neither a good file nor a mapping in YAML."""
    if not is_config_text(value):
        read_document(value)
    elif not isinstance(parse_value(value), dict):
        raise ConfigError("--config: the text given is not a mapping in YAML; give the name of a file.")
