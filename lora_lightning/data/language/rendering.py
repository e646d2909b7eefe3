"""Write conversations out with one chat template."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from lora_lightning.data.language.conversations import Sample
from lora_lightning.data.language.turns import Message
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.texts.chat_templates import TEMPLATE_NAMES, marks_answers

Span = tuple[int, int]


class Rendering(NamedTuple):
    """What a template writes for some turns.

    Args:
        text: The text.
        marked: Where in it the template marks the assistant's words.
    """

    text: str
    marked: tuple[Span, ...] = ()


class CallForm(NamedTuple):
    """How a template wants a turn with tool calls.

    Args:
        arguments_as_text: Whether arguments must be JSON as a text, as in OpenAI's interface, instead of an object.
        blank_is_none: Whether blank content must be None, as in OpenAI's interface.
    """

    arguments_as_text: bool = False
    blank_is_none: bool = False

    def apply(self, message: Message) -> dict[str, Any]:
        """Return a message as the template takes it."""
        turn = message.as_dict()
        if "reasoning_content" in turn:
            # The name under which gpt-oss's template reads thoughts.
            turn["thinking"] = turn["reasoning_content"]
        if self.blank_is_none and "tool_calls" in turn and not message.content.strip():
            turn["content"] = None
        if self.arguments_as_text and "tool_calls" in turn:
            turn["tool_calls"] = [_with_text(call) for call in turn["tool_calls"]]
        return turn


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Writes turns with a template.

    Args:
        tokenizer_name: What messages call the tokenizer.
        template: The chat template as Jinja; None where there is none.
        special_tokens: The tokenizer's special tokens by name, which templates may write.
        arguments: Further arguments of the template, such as `enable_thinking`.
    """

    tokenizer_name: str
    template: str | None
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ConfigError: One of them is taken, or the template does not read it.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        taken = {"messages", *inspect.signature(render_jinja_template).parameters, *self.special_tokens}
        for name in self.arguments:
            if name in taken:
                raise ConfigError(f"template_arguments sets {name!r}, which the data sets; leave it out.")
            if name not in (self.template or ""):
                raise ConfigError(
                    f"template_arguments sets {name!r}, which the chat template of {self.tokenizer_name} does not "
                    "read; correct the name, or leave it out."
                )

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks the assistant's words."""
        return self.template is not None and marks_answers(self.template)

    def write(self, sample: Sample, count: int | None = None, *, prompt: bool = False) -> Rendering:
        """Write the first turns of a sample, or all; with `prompt`, up to where the assistant's next words begin.

        Raises:
            DataError: There is no template, or it refuses the conversation.
        """
        return self._write(sample, count, prompt, self._call_form)

    @cached_property
    def _call_form(self) -> CallForm:
        """The first of the usual forms in which the template writes a tool call."""
        function = {"name": "somename", "arguments": {"someargument": "somevalue"}}
        call = {"type": "function", "id": "call00001", "function": function}
        sample = Sample("", (Message("user", "x"), Message("assistant", "", extra={"tool_calls": [call]})))
        for form in itertools.starmap(CallForm, itertools.product((False, True), repeat=2)):
            try:
                text = self._write(sample, None, False, form).text
            except DataError:
                continue
            # In single quotes stands Python's way to write a dict, under templates that expect a text.
            if "somename" in text and "somevalue" in text and "'someargument'" not in text:
                return form
        return CallForm()

    def _write(self, sample: Sample, count: int | None, prompt: bool, form: CallForm) -> Rendering:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.template is None:
            raise DataError(
                f"{sample.place}: the tokenizer of {self.tokenizer_name} has no chat template, which a conversation "
                f"needs; set template to one of {', '.join(TEMPLATE_NAMES)}, or a .jinja file."
            )
        try:
            texts, spans = render_jinja_template(
                [[form.apply(message) for message in sample.messages[:count]]],
                tools=list(sample.tools) or None,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marks_answers,
                add_generation_prompt=prompt,
                **self.special_tokens,
                **self.arguments,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DataError(
                f"{sample.place}: the chat template of {self.tokenizer_name} refuses this conversation: {reason}."
            ) from error
        return Rendering(texts[0], tuple(map(tuple, spans[0])) if spans else ())


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call whose arguments are JSON as a text."""
    function = dict(call["function"])
    if not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}
