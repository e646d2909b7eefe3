"""Calling a function with the settings of a command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lora_lightning.config.config_option import StrictConfigFile
from lora_lightning.config.diagnosis import explain
from lora_lightning.config.parser_errors import reduce_error, unknown_options
from lora_lightning.config.settings import collect
from lora_lightning.config.signatures import flag_names, parameters_of_function
from lora_lightning.config.strict_yaml import PARSER_MODE, register
from lora_lightning.errors import ConfigError


def call_from_arguments(prog: str, function: Callable[..., Any], arguments: Sequence[str]) -> Any:  # noqa: ANN401
    """Call a function with options made from its signature; its docstring is the help.

    Args:
        prog: What the usage line calls the program.
        function: Any function with typed parameters.
        arguments: The command line.

    Returns:
        What the function returns.

    Raises:
        ConfigError: The command line does not fit the signature.
    """
    register()
    parser = ArgumentParser(prog=prog, exit_on_error=False, parser_mode=PARSER_MODE, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=StrictConfigFile, help="Path to a YAML file with these settings.")
    parser.add_function_arguments(function, as_positional=False)
    try:
        config = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ConfigError(_explain(error, function, arguments)) from error
    config.pop("config", None)
    return function(**parser.instantiate(config).as_dict())


def _explain(error: Exception, function: Callable[..., Any], arguments: Sequence[str]) -> str:
    schema = parameters_of_function(function)
    text = unknown_options(str(error), flag_names(schema))
    return text or explain(collect(arguments), schema) or reduce_error(str(error))
