"""Check that a chat template writes the whole content of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
_CONTENT, _THOUGHTS = "messages[].content", "messages[].reasoning_content"
_CALLS = "messages[].tool_calls"
_ARGUMENTS = f"{_CALLS}[].function.arguments"
_ALPACA = ("instruction", "input")
_REQUIRED = {
    _CONTENT: "the content",
    _THOUGHTS: "the thoughts (reasoning_content)",
    f"{_CALLS}[].function.name": "the tool call {!r}",
    _ARGUMENTS: "the argument {!r} of a tool call",
    "tools[].name": "the description of the tool {!r} (tools)",
    "tools[].description": "the description {!r} of a tool (tools)",
}
"""Content that a template must write, and its names in messages."""


class Item(NamedTuple):
    """One value that a conversation holds.

    Args:
        turn: Index of its turn, or -1 for what belongs to all.
        field: The path of its field.
        value: The value.
        probe: The word that replaces it when the template is tested.
    """

    turn: int
    field: str
    value: str
    probe: str


@dataclass(eq=False)
class Coverage:
    """Refuses conversations of which the template omits something.

    Words must occur in the text. A short value, such as a tool's name, may occur there for another reason. Therefore
    the template is tested once for each structure of a conversation, with unique words instead of all values.

    Args:
        renderer: Writes the conversations.
    """

    renderer: Renderer
    _lost: dict[int, list[int]] = field(default_factory=dict, init=False)

    def check(self, sample: Sample, views: Sequence[View]) -> set[str]:
        """Return the names of fields that no view holds, though they are optional: names, ids, earlier thoughts.

        Raises:
            DataError: The template omits content, a tool call, a tool's description, or thoughts to be learnt. It may
                omit earlier thoughts, and earlier words beside tool calls.
        """
        held: set[Item] = set()
        written: set[Item] = set()
        for view in views:
            probe = _Probe(sample, view.count)
            lost = self._lost_in(probe, view)
            for item in lost:
                if item.field in _REQUIRED and not _may_be_dropped(sample, item, view):
                    raise self._refusal(sample, item)
            held.update(probe.items)
            written.update(set(probe.items).difference(lost))
        ignored = {item.field for item in held - written}
        if views and views[-1].count < len(sample.messages):
            ignored.add("turns after the last learnt answer")
        return ignored

    def _lost_in(self, probe: _Probe, view: View) -> list[Item]:
        """Return what the template omits of a conversation."""
        shape = hash(repr((probe.sample.messages, probe.sample.tools)))
        if shape not in self._lost:
            text = self._tried(probe)
            self._lost[shape] = [number for number, item in enumerate(probe.items) if item.probe not in text]
        lost = [probe.items[number] for number in self._lost[shape]]
        words = [item for item in probe.items if item.field in (_CONTENT, _THOUGHTS)]
        return lost + [item for item in words if not _is_written(item.value, view.text)]

    def _tried(self, probe: _Probe) -> str:
        try:
            return self.renderer.write(probe.sample).text
        except DataError:
            # It takes the conversation, but not with other words; then only the words can be checked.
            return " ".join(item.probe for item in probe.items)

    def _refusal(self, sample: Sample, item: Item) -> DataError:
        place = sample.place if item.turn < 0 else f"{sample.place}, turn {item.turn + 1}"
        return DataError(
            f"{place}: the chat template of {self.renderer.tokenizer_name} leaves out or changes "
            f"{_REQUIRED[item.field].format(item.value[:40])}. Set template to one that writes it (a name, or a .jinja "
            "file), or remove it from the data."
        )


class _Probe:
    """A conversation of the same structure with unique words, and the values that they replace."""

    def __init__(self, sample: Sample, count: int) -> None:
        self.items: list[Item] = []
        self._ids: dict[str, str] = {}
        tools = tuple(map(self._tool, sample.tools))
        messages = tuple(self._message(turn, message) for turn, message in enumerate(sample.messages[:count]))
        self.sample = Sample(sample.place, messages, tools=tools)

    def _word(self, turn: int, path: str, value: object) -> str:
        """Return the word for a value; a blank value is not replaced."""
        if not str(value).strip():
            return str(value)
        # Of nine letters, as Mistral's templates want an id; the same for a call and its answer.
        word = f"zq{len(self.items):05d}qz"
        if path.endswith("id"):
            word = self._ids.setdefault(str(value), word)
        self.items.append(Item(turn, path, str(value), word))
        return word

    def _tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tool with words as its name and its description; templates may go by the kinds of its parameters."""
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self._tool(tool["function"])}
        texts = {name: tool[name] for name in ("name", "description") if isinstance(tool.get(name), str)}
        return {**tool, **{name: self._word(-1, f"tools[].{name}", text) for name, text in texts.items()}}

    def _message(self, turn: int, message: Message) -> Message:
        thoughts, words = split_thoughts(message)
        extra = dict(message.extra)
        # Alpaca's template writes an instruction and its input instead of the content, which joins them.
        parts = [extra[name].strip() for name in _ALPACA if name in extra] or [words]
        probes = [self._word(turn, _CONTENT, part) for part in parts]
        content = "\n\n".join(filter(None, probes))
        thought = self._word(turn, _THOUGHTS, thoughts)
        if thoughts and _END_OF_THOUGHTS in message.content:
            content = f"<think>\n{thought}\n</think>\n\n{content}"
        replaced = dict(zip(_ALPACA, probes, strict=False)) | {"reasoning_content": thought}
        for name, value in extra.items():
            extra[name] = replaced[name] if name in replaced else self._replaced(turn, f"messages[].{name}", value)
        return replace(message, content=content, extra=extra)

    def _replaced(self, turn: int, path: str, value: Any) -> Any:  # noqa: ANN401 - whatever the message holds
        """Return a value with words in place of all texts and numbers in it."""
        is_argument = path == _ARGUMENTS  # of which the parts are not told apart
        if isinstance(value, Mapping):
            paths = {name: path if is_argument else f"{path}.{name}" for name in value}
            return {name: self._replaced(turn, paths[name], one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._replaced(turn, path if is_argument else f"{path}[]", one) for one in value]
        if value is None or path == f"{_CALLS}[].type":
            return value
        return self._word(turn, path, value)


def _may_be_dropped(sample: Sample, item: Item, view: View) -> bool:
    """Return whether a value belongs to the way to an earlier answer: thoughts, and words beside tool calls."""
    if item.turn in view.learnt:
        return False
    return item.field == _THOUGHTS or (item.field == _CONTENT and "tool_calls" in sample.messages[item.turn].extra)


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


def _is_written(value: str, text: str) -> bool:
    """Return whether a text holds a value, also with other white space, as JSON, or without the switches."""
    if value in text:
        return True
    text = _squeezed(text)
    as_json = json.dumps(value, ensure_ascii=False)[1:-1]
    return _squeezed(value) in text or _squeezed(as_json) in text


def _squeezed(text: str) -> str:
    return "".join(_SWITCHES.sub("", text).split())
