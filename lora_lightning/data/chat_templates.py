"""Chat templates by name, for tokenizers that have none: Jinja that marks the assistant's words."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import ConfigError
from lora_lightning.paths import nearest, resolve

END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<turn|>", "<|return|>", "</s>", "<|endoftext|>")
"""Tokens that end a turn in the usual formats."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_FILES = (".jinja", ".jinja2", ".j2")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a format frames the turns of a conversation.

    Args:
        system: What stands before and after the system's words; None puts them before the first question.
        user: What stands before and after the user's words.
        assistant: What stands before the assistant's words: the prompt for an answer.
        lead: What the answer begins with, such as a blank; it is trained.
        end: What ends an answer; it is trained. None means the tokenizer's end token.
        between: What stands between an answer and the next turn.
        trim: Whether white space around the words is left out.
    """

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: str
    lead: str = ""
    end: str | None = None
    between: str = "\n"
    trim: bool = False

    def jinja(self) -> str:
        """Write the format as a template."""
        words = "(message['content'] | trim)" if self.trim else "message['content']"
        system = self.system or (self.user[0], "\n\n")
        opening = f"{{{{- {json.dumps(self.user[0])} -}}}}"
        if self.system is None:
            # The system's words have opened the question already.
            is_open = "loop.previtem is defined and loop.previtem['role'] == 'system'"
            opening = f"{{%- if not ({is_open}) -%}}{opening}{{%- endif -%}}"
        end = "eos_token" if self.end is None else json.dumps(self.end)
        return (
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}"
            f"{opening}{{{{- {words} -}}}}{{{{- {json.dumps(self.user[1])} -}}}}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{{{- {json.dumps(self.assistant)} -}}}}"
            f"{{%- generation -%}}{{{{- {json.dumps(self.lead)} -}}}}{{{{- {words} -}}}}{{{{- {end} -}}}}"
            "{%- endgeneration -%}"
            f"{{{{- {json.dumps(self.between)} -}}}}"
            "{%- elif message['role'] == 'system' -%}"
            f"{{{{- {json.dumps(system[0])} -}}}}{{{{- {words} -}}}}{{{{- {json.dumps(system[1])} -}}}}"
            "{%- else -%}{{- raise_exception('it takes the roles system, user and assistant') -}}"
            "{%- endif -%}{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{- {json.dumps(self.assistant)} -}}}}{{%- endif -%}}"
        )


def _headed(name: str) -> str:
    return f"<|start_header_id|>{name}<|end_header_id|>\n\n"


_FORMATS = {
    "chatml": ChatFormat(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
    ),
    "dialogue": ChatFormat(
        system=("", "\n"), user=("User: ", "\n"), assistant="Assistant:", lead=" ", end=None, between="\n"
    ),
    "gemma": ChatFormat(
        system=None,
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant="<start_of_turn>model\n",
        end="<end_of_turn>",
        trim=True,
    ),
    "llama3": ChatFormat(
        system=(_headed("system"), "<|eot_id|>"),
        user=(_headed("user"), "<|eot_id|>"),
        assistant=_headed("assistant"),
        end="<|eot_id|>",
        between="",
        trim=True,
    ),
    "mistral": ChatFormat(
        system=None, user=("[INST] ", " [/INST]"), assistant="", lead=" ", end=None, between="", trim=True
    ),
    "phi3": ChatFormat(
        system=("<|system|>\n", "<|end|>\n"),
        user=("<|user|>\n", "<|end|>\n"),
        assistant="<|assistant|>\n",
        end="<|end|>",
    ),
    "plain": ChatFormat(system=("", "\n"), user=("", "\n"), assistant="", between="\n"),
    "zephyr": ChatFormat(
        system=("<|system|>\n", "</s>\n"), user=("<|user|>\n", "</s>\n"), assistant="<|assistant|>\n", end="</s>"
    ),
}

_ALPACA = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set instruction = message['instruction'] if message['instruction'] is defined else message['content'] -%}"
    "{%- set input = message['input'] if message['input'] is defined else '' -%}"
    "{%- if loop.first -%}"
    "{{- 'Below is an instruction that describes a task' -}}"
    "{{- ', paired with an input that provides further context' if input | trim else '' -}}"
    "{{- '. Write a response that appropriately completes the request.\\n\\n' -}}"
    "{%- endif -%}"
    "{{- '### Instruction:\\n' + instruction + '\\n\\n' -}}"
    "{%- if input | trim -%}{{- '### Input:\\n' + input + '\\n\\n' -}}{%- endif -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '### Response:\\n' -}}"
    "{%- generation -%}{{- message['content'] -}}{{- eos_token -}}{%- endgeneration -%}{{- '\\n\\n' -}}"
    "{%- elif message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
    "{%- else -%}{{- raise_exception('it takes the roles system, user and assistant') -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
)
_TEMPLATES = {"alpaca": _ALPACA, **{name: one.jinja() for name, one in _FORMATS.items()}}

TEMPLATE_NAMES = tuple(sorted(_TEMPLATES))
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
    if name not in _TEMPLATES:
        near = nearest(name, TEMPLATE_NAMES, count=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"template {name!r} is unknown; expected one of {', '.join(TEMPLATE_NAMES)}, or a .jinja file.{hint}"
        )
    return ("{{- bos_token -}}" if bos else "") + _TEMPLATES[name]


def marks_answers(template: str) -> bool:
    """Tell whether a template marks the assistant's words.

    Example:
        >>> marks_answers(chat_template("gemma")), marks_answers("{{ messages[0]['content'] }}")
        (True, False)
    """
    return _MARKER.search(template) is not None


def begins_with_bos(tokenizer: Any) -> bool:  # noqa: ANN401 - transformers' tokenizers share no public base class
    """Tell whether a tokenizer puts its begin token in front of every text."""
    framed = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and framed[:1] == [tokenizer.bos_token_id]
