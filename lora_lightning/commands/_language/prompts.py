"""The prompts of a command line."""

from __future__ import annotations

import json

from lora_lightning.data.sources.read import read_records
from lora_lightning.data.sources.record import Record
from lora_lightning.errors import ConfigError
from lora_lightning.paths import nearest_in_folder, resolve

_COLUMN = "prompt"
_TABLES = (".csv", ".tsv", ".json", ".parquet")


def read_prompts(prompt: str | None, prompts_file: str | None) -> list[str]:
    """Return the prompts that a command line names.

    Args:
        prompt: One prompt.
        prompts_file: A file with one prompt a line; in a `.jsonl` file each line is a JSON string, or an object with
            `prompt`, so that prompts may have several lines. Tables (`.csv`, `.tsv`, `.parquet`) have a column
            `prompt`.

    Raises:
        ConfigError: Both or none are given, the file is missing or malformed, or a prompt is empty.
        DataError: A table cannot be read.
    """
    if (prompt is None) == (prompts_file is None):
        given = "Both --prompt and --prompts_file are given" if prompt is not None else "There is no prompt"
        raise ConfigError(f"{given}: give --prompt 'some words', or a file of prompts with --prompts_file.")
    if prompts_file is None:
        assert prompt is not None
        if not prompt.strip():
            raise ConfigError("The prompt is empty; give at least one word.")
        return [prompt]
    path = resolve(prompts_file)
    if not path.is_file():
        raise ConfigError(f"There is no file of prompts {prompts_file!r}; {nearest_in_folder(path)}.")
    if path.suffix in _TABLES:
        return [_prompt_of(record) for record in read_records(str(path))]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"The file of prompts {prompts_file!r} cannot be read: {reason}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{prompts_file} holds no prompt.")
    if path.suffix not in (".jsonl", ".ndjson"):
        return [line for _, line in numbered]
    return [_prompt_from_json(line, f"{prompts_file}, line {number}") for number, line in numbered]


def _prompt_of(record: Record) -> str:
    if _COLUMN not in record.fields:
        columns = ", ".join(map(repr, record.fields))
        raise ConfigError(f"{record.place}: expected a column {_COLUMN!r}, found {columns}.")
    found = record.fields[_COLUMN]
    if not isinstance(found, str) or not found.strip():
        raise ConfigError(f"{record.place}: expected a {_COLUMN} that is a text and not empty, got {found!r}.")
    return found


def _prompt_from_json(line: str, place: str) -> str:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not valid JSON ({error}).") from error
    found = data.get("prompt") if isinstance(data, dict) else data
    if not isinstance(found, str) or not found.strip():
        raise ConfigError(f"{place}: expected a JSON string, or an object whose `prompt` is one, that is not empty.")
    return found
