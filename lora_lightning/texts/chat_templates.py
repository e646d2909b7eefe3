"""Chat templates by name, for tokenizers that have none: Jinja files that mark the assistant's words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError
from lora_lightning.paths import nearest, resolve

END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<turn|>", "<|return|>", "</s>", "<|endoftext|>")
"""Tokens that end a turn in the usual formats."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_FILES = (".jinja", ".jinja2", ".j2")
_FOLDER = Path(__file__).with_name("templates")

TEMPLATE_NAMES = tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))
"""The templates known by name."""


def chat_template(name: str, *, bos: bool = False) -> str:
    """Return a chat template as Jinja, for `tokenizer.chat_template` or `apply_chat_template`.

    Args:
        name: One of `TEMPLATE_NAMES`, or the path of a `.jinja` file.
        bos: Begin with the tokenizer's begin token, for models that were trained with one (see `begins_with_bos`); a
            file decides for itself.

    Raises:
        ConfigError: There is no such template.

    Example:
        >>> "<|im_start|>assistant" in chat_template("chatml")
        True
    """
    if name.endswith(_TEMPLATE_FILES):
        path = resolve(name)
        if not path.is_file():
            raise ConfigError(f"The template file {name!r} does not exist.")
        return path.read_text("utf-8")
    if name not in TEMPLATE_NAMES:
        near = nearest(name, TEMPLATE_NAMES, count=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"template {name!r} is unknown; expected one of {', '.join(TEMPLATE_NAMES)}, or a .jinja file.{hint}"
        )
    opening = "{{- bos_token -}}" if bos else ""
    return opening + (_FOLDER / f"{name}.jinja").read_text("utf-8")


def marks_answers(template: str) -> bool:
    """Return whether a template marks the assistant's words.

    Example:
        >>> marks_answers(chat_template("gemma")), marks_answers("{{ messages[0]['content'] }}")
        (True, False)
    """
    return _MARKER.search(template) is not None


def begins_with_bos(tokenizer: Any) -> bool:  # noqa: ANN401 - transformers' tokenizers share no public base class
    """Return whether a tokenizer puts its begin token in front of every text."""
    framed = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and framed[:1] == [tokenizer.bos_token_id]
