"""Parser errors, reduced to the relevant line."""

from __future__ import annotations

import re
from collections.abc import Collection

from lora_lightning.config.right_words.misplaced import right_setting
from lora_lightning.errors import UserError
from lora_lightning.trust import is_allowed, refusal
from lora_lightning.wording import one_line, suggestion

_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Parser key|Problem with given class_path"
    r"|Expected a <class 'NoneType'>|Expected a <class 'list'>|Subclass types expect one of|a class path \(str\)"
    r"|a dict with(out)? )"
)
_CLASS = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>")


_MISSING = (
    re.compile(r"Requirement '([^']+)' not met"),  # Lightning's loggers
    re.compile(r"Module not found: '([\w.]+)'"),
    re.compile(r"Neither `(tensorboard)` nor `tensorboardX` is available"),
    re.compile(r"No module named '(\w+)"),
    re.compile(r"import of (\w+) halted"),
)


_CONFIGS = (".yaml", ".yml", ".json")


def reduce_error(text: str) -> str:
    r"""Return the useful part of a jsonargparse error as one line: the keys that lead to it, and what is wrong.

    Example:
        >>> reduce_error('Parser key "model":\n  Errors:\n    - Parser key "r":\n      Not an int')
        'model.r: Not an int'
    """
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    keys: list[str] = []
    for line in lines:
        match = re.match(r'Parser key "([^"]+)"(?: element \d+)?:\s*(.*)', line)
        if match:
            keys.append(match[1])
        useful = match[2] if match else line
        if useful and not _NOISE.match(useful):
            message = refused_import(useful) or one_line(_CLASS.sub(r"\1", useful))
            return f"{'.'.join(keys)}: {message}" if keys else message
    return one_line(text)


def own_message(error: BaseException) -> str:
    """Return the message of the `UserError` in a chain of exceptions, else that of the last exception.

    jsonargparse wraps the error of a class about its settings into a list of all types that it tried.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return reduce_error(str(error)) if cause is None else str(cause)


def missing_package(error: BaseException) -> str | None:
    """Return what to install if a class needs a missing package, or None for another error."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        found = next((match for match in (pattern.search(text) for pattern in _MISSING) if match), None)
        if found is not None:
            package, requirement = re.split(r"[^\w.-]", found[1])[0], found[1]
            named = re.findall(r"class_path '(?:[\w.]+\.)?(\w+)'", str(error))
            owner = named[-1] if named else "A class that the settings name"
            return f"{owner} needs the package {package}, which is not installed: pip install '{requirement}'."
        cause = cause.__cause__ or cause.__context__
    return None


def refused_import(text: str) -> str | None:
    """Return our message if jsonargparse refuses to import what a value names, or None for another error."""
    match = re.search(r"Importing '([^']+)' is not allowed", text)
    if match is None:
        return None
    if not is_allowed(match[1]):
        return refusal(match[1], "a setting")
    return f"{match[1]} is not imported because a setting names it: it could run any command; name another."


def unknown_options(text: str, known: list[str], settings: Collection[str] = ()) -> str | None:
    """Explain `unrecognized arguments: --ckpt_pth X`, or return None for another error.

    Args:
        text: The parser's error.
        known: The options that there are, with their dashes.
        settings: All settings, those of classes too, without dashes; a misplaced one is looked for among them.
    """
    match = re.match(r"unrecognized arguments: (.*)", text)
    if match is None:
        return None
    option = next((word for word in match[1].split() if word.startswith("-")), None)
    if option is None:
        file = next((word for word in match[1].split() if word.endswith(_CONFIGS)), None)
        hint = "settings are given as --name value" if file is None else f"did you mean --config {file}?"
        return f"unexpected words: {match[1]}; {hint}"
    name = option.partition("=")[0]
    right = right_setting(name.lstrip("-").removesuffix("+"), settings, as_flag=True)
    if right is not None:
        return f"unknown option `{name}`; use {right}"
    return f"unknown option `{name}`; {suggestion(name, known, 'options')}"
