"""The command `schema`."""

from __future__ import annotations

import json
from pathlib import Path


def schema(output: str | None = None) -> int:
    """Write the JSON Schema of config files, with which editors complete and check them.

    Name it in the first line of a config, relative to it: `# yaml-language-server: $schema=schema.json`.

    Args:
        output: File to write it to; None prints it.
    """
    # Not at the top: it takes all classes.
    from lora_lightning.commands._schema.config import config_schema

    text = json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
    else:
        Path(output).write_text(text, encoding="utf-8")
        print(f"Wrote the schema of config files to {output}.")
    return 0
