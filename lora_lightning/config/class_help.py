"""The help on one class that a config may name, with all its settings."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from lora_lightning.errors import ConfigError
from lora_lightning.public import find, table
from lora_lightning.wording import suggestion


def class_help(name: str) -> str:
    """Return the settings of a public class, with types and defaults.

    Args:
        name: Such as `LoRA`.

    Raises:
        ConfigError: There is no such class.
    """
    classes = [one for one in table().modules if one[0].isupper()]
    if name not in classes:
        raise ConfigError(f"there is no help on `{name}`; {suggestion(name, [*classes, 'all'])}")
    parser = ArgumentParser(prog=name, usage=f"{name} in a config, or as flags after the flag that names it")
    parser.add_class_arguments(find(name))
    return str(parser.format_help()).rstrip()
