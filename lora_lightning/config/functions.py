"""Calling a function with the settings of a command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from lora_lightning.config.config_option import StrictConfigFile
from lora_lightning.config.diagnosis import explain, refusal_of_building, refuse_ignored
from lora_lightning.config.import_policy import set_import_policy
from lora_lightning.config.parser_errors import reduce_error, unknown_options
from lora_lightning.config.right_words.misplaced import settings_known
from lora_lightning.config.settings import collect
from lora_lightning.config.signatures import Parameters, alternatives, flag_names, parameters_of_function
from lora_lightning.config.strict_yaml import PARSER_MODE, register
from lora_lightning.errors import ConfigError


def call_from_arguments(prog: str, function: Callable[..., Any], arguments: Sequence[str]) -> Any:  # noqa: ANN401 - what the function returns
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
    set_import_policy()
    parser = ArgumentParser(prog=prog, exit_on_error=False, parser_mode=PARSER_MODE, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=StrictConfigFile, help="Path to a YAML file with these settings.")
    parser.add_function_arguments(function, as_positional=False)
    arguments = plain_flags(arguments, parameters_of_function(function))
    try:
        config = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(_explain(error, function, arguments)) from error
    refuse_ignored(collect(arguments), parameters_of_function(function))
    config.pop("config", None)
    try:
        settings = parser.instantiate(config).as_dict()
    except (ValueError, ImportError) as error:  # a class refuses its settings
        refusal = refusal_of_building(error, collect(arguments), parameters_of_function(function))
        if refusal is None:
            raise
        raise ConfigError(refusal) from error
    return function(**settings)


def plain_flags(arguments: Sequence[str], parameters: Parameters) -> list[str]:
    """Return a command line with flags as the parser takes them: `--compare-base` becomes `--compare_base=true`.

    Hyphens in a known flag's name count as underscores, a flag that is true or false may stand alone, and a flag that
    takes a list may be given once for each item.

    Args:
        arguments: The command line.
        parameters: What the function takes.

    Example:
        >>> plain_flags(["--dry-run", "--num", "3"], Parameters({"dry_run": bool, "num": int}))
        ['--dry_run=true', '--num', '3']
        >>> plain_flags(["--adapter", "a", "--adapter=b"], Parameters({"adapter": list[str]}))
        ['--adapter+', 'a', '--adapter+=b']
    """
    plain: list[str] = []
    for position, argument in enumerate(arguments):
        name, has_value, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or name not in parameters.types:
            plain.append(argument)
            continue
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        if not has_value and bool in alternatives(parameters.types[name]) and following.startswith("--"):
            has_value, value = "=", "true"
        is_one_more = _takes_lists_alone(parameters.types[name]) and not (value or following).startswith("[")
        plain.append(f"--{name}{'+' if is_one_more else ''}{has_value}{value}")
    return plain


def _takes_lists_alone(annotation: Any) -> bool:  # noqa: ANN401 - any type
    return [get_origin(one) for one in alternatives(annotation)] == [list]


def _explain(error: Exception, function: Callable[..., Any], arguments: Sequence[str]) -> str:
    schema, written = parameters_of_function(function), collect(arguments)
    text = unknown_options(str(error), flag_names(schema), settings_known(schema, written.tree))
    return text or explain(written, schema) or reduce_error(str(error))
