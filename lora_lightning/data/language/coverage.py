"""Check that what a conversation holds comes out of its chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lora_lightning.data.language.answers import View
from lora_lightning.data.language.conversations import Sample
from lora_lightning.data.language.rendering import Renderer
from lora_lightning.data.language.turns import Message
from lora_lightning.errors import DataError

_END_OF_THOUGHTS = "</think>"
# Switches inside the words, which templates of Nemotron read and leave out.
_SWITCHES = re.compile(r"/(no_)?think\b")


class Item(NamedTuple):
    """Something that a conversation holds.

    Args:
        turn: Index of its turn, or -1 for what belongs to all.
        field: Its field's name, as it is counted where a template may leave it out.
        shown: What messages call it; empty for what a template may leave out.
        probe: The word that stood in its place when the template was tried.
    """

    turn: int
    field: str
    shown: str
    probe: str


@dataclass(eq=False)
class Coverage:
    """Refuses conversations of which the template leaves something out.

    Content must stand in the text. For what can be as short as a tool's name, which the text may hold for another
    reason, the template is tried once for each shape of a conversation, with words in its place that occur nowhere
    else.

    Args:
        renderer: Writes the conversations.
    """

    renderer: Renderer
    _lost: dict[Any, list[int]] = field(default_factory=dict, init=False)

    def check(self, sample: Sample, views: Sequence[View]) -> set[str]:
        """Return the names of fields that no view holds, though they are optional: names, ids, earlier thoughts.

        Raises:
            DataError: The template leaves out content, a tool call, a tool's description, or thoughts to be learnt.
        """
        optional: set[str] = set()
        learnt = {index for view in views for index in view.learnt}
        for view in views:
            lost = self._lost_in(sample, view)
            for item in lost:
                is_thought = item.field.endswith("reasoning_content")
                if item.shown and (not is_thought or item.turn in view.learnt):
                    raise DataError(self._refusal(sample, item.turn, item.shown))
            if view is views[-1]:
                optional = {item.field for item in lost if item.turn not in learnt or not item.shown}
            self._check_content(sample, view)
        if views and views[-1].count < len(sample.messages):
            optional.add("turns after the last learnt answer")
        return optional

    def _lost_in(self, sample: Sample, view: View) -> list[Item]:
        """Return what the template leaves out of conversations of this shape."""
        messages = sample.messages[: view.count]
        shape = (*map(_shape, messages), len(sample.tools))
        if self._lost.get(shape) == []:
            return []
        probe = _Probe(messages, sample.tools)
        if shape not in self._lost:
            text = self._tried(probe, sample.place)
            self._lost[shape] = [number for number, item in enumerate(probe.items) if item.probe not in text]
        return [probe.items[number] for number in self._lost[shape]]

    def _tried(self, probe: _Probe, place: str) -> str:
        try:
            return self.renderer.write_messages(probe.messages, probe.tools, place).text
        except DataError:
            # It takes the conversation, but not with other words; then only the content can be checked.
            return " ".join(item.probe for item in probe.items)

    def _check_content(self, sample: Sample, view: View) -> None:
        for index, message in enumerate(sample.messages[: view.count]):
            thoughts, words = split_thoughts(message)
            wanted = [("the content", part) for part in _parts(message, words)]
            if index in view.learnt:
                wanted.append(("the thoughts", thoughts))
            for shown, part in wanted:
                if part not in view.text and not _is_written(part, view.text):
                    raise DataError(self._refusal(sample, index, shown))

    def _refusal(self, sample: Sample, index: int, shown: str) -> str:
        place = f"{sample.place}, turn {index + 1}" if index >= 0 else sample.place
        return (
            f"{place}: the chat template of {self.renderer.tokenizer_name} leaves out or changes {shown}. Set template "
            "to one that writes it (a name, or a .jinja file), or remove it from the data."
        )


def split_thoughts(message: Message) -> tuple[str, str]:
    """Return an assistant's thoughts, and its words after them, where both stand in the content.

    Example:
        >>> split_thoughts(Message("assistant", "<think>1 + 1</think> 2"))
        ('1 + 1', '2')
    """
    thoughts = str(message.extra.get("reasoning_content", ""))
    if message.role != "assistant" or _END_OF_THOUGHTS not in message.content:
        return thoughts.strip(), message.content.strip()
    inside, _, words = message.content.rpartition(_END_OF_THOUGHTS)
    return inside.rpartition("<think>")[2].strip() or thoughts.strip(), words.strip()


def _parts(message: Message, words: str) -> list[str]:
    """Return the texts that make up a turn's content: two for Alpaca's instruction with an input."""
    if "instruction" in message.extra:
        return [message.extra["instruction"].strip(), message.extra["input"].strip()]
    return [words]


def _is_written(part: str, text: str) -> bool:
    """Return whether a text holds a part with other white space, as JSON, or without the switches."""
    text = _squeezed(text)
    as_json = json.dumps(part, ensure_ascii=False)[1:-1]
    return _squeezed(part) in text or _squeezed(as_json) in text


def _squeezed(text: str) -> str:
    return "".join(_SWITCHES.sub("", text).split())


def _shape(message: Message) -> tuple[Any, ...]:
    """Return what a template may look at besides the words themselves."""
    thoughts, words = split_thoughts(message)
    calls = [(sorted(call), bool(call["function"]["arguments"])) for call in message.extra.get("tool_calls", ())]
    in_content = _END_OF_THOUGHTS in message.content
    return (message.role, bool(words), bool(thoughts), in_content, tuple(sorted(message.extra)), str(calls))


class _Probe:
    """A conversation of the same shape with words that occur nowhere else, and what they stand for."""

    def __init__(self, messages: Iterable[Message], tools: Iterable[Any]) -> None:
        self.items: list[Item] = []
        self._ids: dict[str, str] = {}
        self.tools = [self._tool(tool) for tool in tools]
        self.messages = [self._message(index, message) for index, message in enumerate(messages)]

    def _word(self, turn: int, name: str, shown: str) -> str:
        probe = f"zq{len(self.items)}qz"
        self.items.append(Item(turn, name, shown, probe))
        return probe

    def _tool(self, tool: Any) -> Any:  # noqa: ANN401 - tools are whatever templates take
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": self._tool(tool["function"])}
        if not isinstance(tool.get("name"), str):
            return tool
        return {**tool, "name": self._word(-1, "tools", f"the description of the tool {tool['name']!r} (tools)")}

    def _message(self, index: int, message: Message) -> Message:
        extra = dict(message.extra)
        thoughts, words = split_thoughts(message)
        content = self._word(index, "messages[].content", "the content") if words else ""
        if thoughts:
            thought = self._word(index, "messages[].reasoning_content", "the thoughts (reasoning_content)")
            if _END_OF_THOUGHTS in message.content:
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            if "reasoning_content" in extra:
                extra["reasoning_content"] = thought
        if "instruction" in extra:
            extra["instruction"], extra["input"] = content, ""
        if "name" in extra:
            extra["name"] = self._word(index, "messages[].name", "")
        if "tool_call_id" in extra:
            extra["tool_call_id"] = self._id(index, extra["tool_call_id"], "messages[].tool_call_id")
        if "tool_calls" in extra:
            extra["tool_calls"] = [self._call(index, call) for call in extra["tool_calls"]]
        return replace(message, content=content, extra=extra)

    def _call(self, index: int, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        shown = f"the tool call {function['name']!r}"
        function["name"] = self._word(index, "messages[].tool_calls", shown)
        if function["arguments"]:
            value = self._word(index, "messages[].tool_calls", f"the arguments of {shown}")
            is_text = isinstance(function["arguments"], str)
            function["arguments"] = value if is_text else {"argument": value}
        probed = {**call, "function": function}
        if "id" in call:
            probed["id"] = self._id(index, call["id"], "messages[].tool_calls[].id")
        return probed

    def _id(self, index: int, value: object, name: str) -> str:
        """Return an id of nine letters, as Mistral's templates want it; the same for the call and its answer."""
        probe = self._ids.setdefault(str(value), f"zq{len(self._ids):05d}qz")
        self.items.append(Item(index, name, "", probe))
        return probe
