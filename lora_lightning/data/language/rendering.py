"""Write conversations out with one chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_lightning.data.language.conversations import Sample
from lora_lightning.data.language.turns import Message
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.texts.chat_templates import TEMPLATE_NAMES, marks_answers

Span = tuple[int, int]
_TAKEN_ARGUMENTS = frozenset(
    (
        "messages",
        "conversations",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
    )
)


@dataclass(frozen=True)
class Rendering:
    """What a template writes for some turns.

    Args:
        text: The text.
        marked: Where in it the template marks the assistant's words.
    """

    text: str
    marked: tuple[Span, ...] = ()


@dataclass(frozen=True)
class CallForm:
    """How a template wants a turn with tool calls.

    Args:
        blank_is_none: Whether blank content must be None, as in OpenAI's interface.
        arguments_as_text: Whether arguments must be JSON as a text, as in OpenAI's interface, instead of an object.
    """

    blank_is_none: bool = False
    arguments_as_text: bool = False


_CALL_FORMS = tuple(CallForm(blank, text) for text in (False, True) for blank in (False, True))


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
        for name in self.arguments:
            if name in _TAKEN_ARGUMENTS or name in self.special_tokens:
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
        return self.write_messages(sample.messages[:count], sample.tools, sample.place, prompt=prompt)

    def write_messages(
        self, messages: Sequence[Message], tools: Sequence[Any], place: str, *, prompt: bool = False
    ) -> Rendering:
        """Write turns; see `write`."""
        calls = any("tool_calls" in message.extra for message in messages)
        form = self.call_form if calls else CallForm()
        return self._write(messages, tools, place, form, prompt=prompt)

    @cached_property
    def call_form(self) -> CallForm:
        """In which form the template writes a tool call: the first of the usual ones in which it does."""
        arguments = {"someargument": "somevalue"}
        call = {"type": "function", "id": "call00001", "function": {"name": "somename", "arguments": arguments}}
        messages = (Message("user", "x"), Message("assistant", "", extra={"tool_calls": [call]}))
        for form in _CALL_FORMS:
            try:
                text = self._write(messages, (), "", form).text
            except DataError:
                continue
            # In single quotes stands Python's way to write a dict, under templates that expect a text.
            if "somename" in text and "somevalue" in text and "'someargument'" not in text:
                return form
        return CallForm()

    def _write(
        self, messages: Sequence[Message], tools: Sequence[Any], place: str, form: CallForm, *, prompt: bool = False
    ) -> Rendering:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.template is None:
            raise DataError(
                f"{place}: the tokenizer of {self.tokenizer_name} has no chat template, which a conversation "
                f"needs; set template to one of {', '.join(TEMPLATE_NAMES)}, or a .jinja file."
            )
        try:
            texts, spans = render_jinja_template(
                [[_for_template(message, form) for message in messages]],
                tools=list(tools) or None,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marks_answers,
                add_generation_prompt=prompt,
                **self.special_tokens,
                **self.arguments,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DataError(
                f"{place}: the chat template of {self.tokenizer_name} refuses this conversation: {reason}."
            ) from error
        marked = spans[0] if spans else ()
        return Rendering(texts[0], tuple((start, end) for start, end in marked))


def _for_template(message: Message, form: CallForm) -> dict[str, Any]:
    """Return a message as templates take it."""
    turn = message.as_dict()
    if "reasoning_content" in turn:
        # The name under which gpt-oss's template reads thoughts.
        turn["thinking"] = turn["reasoning_content"]
    if "tool_calls" not in turn:
        return turn
    if form.blank_is_none and not message.content.strip():
        turn["content"] = None
    if form.arguments_as_text:
        turn["tool_calls"] = [_with_text(call) for call in turn["tool_calls"]]
    return turn


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call whose arguments are JSON as a text."""
    function = dict(call["function"])
    if not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}
