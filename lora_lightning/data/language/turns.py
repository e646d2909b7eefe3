"""Read one turn of a conversation: its role, its words, its tool calls and whether it is to be learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_lightning.data.language.values import Context, from_json, names_of, present, shown, take_first, text_from

# The names that ShareGPT files and other exports give the roles.
_ALIASES = {
    "system": ("developer",),
    "user": ("human",),
    "assistant": ("gpt", "chatgpt", "model", "bot", "function_call"),
    "tool": ("function", "observation"),
}
_ROLE_OF = {name: role for role, aliases in _ALIASES.items() for name in (role, *aliases)}
_MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
_MEANING_OF_MARK = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
# As Llama and Anthropic name them, too.
_NAMES_OF_ARGUMENTS = ("arguments", "parameters", "input")
_CALL = "a tool call must be an object with the name and arguments of a function"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: The words.
        trained: Whether the turn may be trained on; only an assistant's is.
        extra: Further entries for chat templates: `name`, `tool_calls`, `tool_call_id`, `reasoning_content`.
    """

    role: str
    content: str
    trained: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def says_something(self) -> bool:
        """Whether there are words, thoughts or tool calls in it."""
        return bool(self.content.strip() or self.extra.get("tool_calls") or self.extra.get("reasoning_content"))

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        return {**self.extra, "role": self.role, "content": self.content}


def message_from(turn: object, at: Context) -> Message:
    """Read a turn: an object with role (or from) and content (or value).

    Raises:
        DataError: The turn is malformed, or holds something that cannot be learnt.
    """
    if not isinstance(turn, Mapping):
        raise at.error(f"expected an object with role and content, got {shown(turn)}.")
    left = present(turn)
    given = take_first(left, "role", "from")
    role = _ROLE_OF.get(str(given).lower())
    if role is None:
        wrong = "the role is missing" if given is None else f"the role {given!r} is unknown"
        raise at.error(f"{wrong}; expected one of {', '.join(_ALIASES)} (or human, gpt), got {names_of(turn)}.")
    content = take_first(left, "content", "value")
    texts = [name for name in ("name", "tool_call_id") if isinstance(left.get(name), str | int)]
    extra = {name: left.pop(name) for name in texts}
    # OpenAI's older files have one call under the second name.
    calls = [*_tool_calls(left.pop("tool_calls", None), at), *_tool_calls(left.pop("function_call", None), at)]
    if str(given).lower() == "function_call":
        calls, content = [*calls, *_tool_calls(content, at)], ""
    if calls:
        extra["tool_calls"] = calls
    thoughts = text_from(take_first(left, "reasoning_content", "reasoning", "thinking"), "reasoning_content", at)
    if thoughts.strip():
        extra["reasoning_content"] = thoughts
    if content is None and not calls:
        raise at.error(f"the content is missing; expected a text, got {names_of(turn)}.")
    message = Message(role, text_from(content, "content", at), extra=extra)
    is_wanted = _is_wanted(left, role, at)
    at.ignore(left)
    # A blank answer would teach the model to end its turn at once.
    return replace(message, trained=role == "assistant" and is_wanted and message.says_something)


def _is_wanted(left: dict[str, Any], role: str, at: Context) -> bool:
    """Return whether a turn's marks allow it to be learnt; remove the marks that are heeded."""
    marks = {name: left[name] for name in _MARKS if name in left}
    meant = {name: _MEANING_OF_MARK.get(str(mark).strip().lower()) for name, mark in marks.items()}
    for name, is_wanted in meant.items():
        if is_wanted is None:
            raise at.error(
                f"{name} is {shown(marks[name])}; expected 0 or 1 (false or true): weights between them, or for parts "
                "of a turn, are not supported."
            )
    if len(set(meant.values())) > 1:
        raise at.error(f"{' and '.join(meant)} contradict each other; keep one of them.")
    is_wanted = all(meant.values())
    # Only the assistant's turns are learnt: a wish to learn another one is ignored, like any field that nothing uses.
    if role == "assistant" or not is_wanted:
        for name in marks:
            del left[name]
    return is_wanted


def _tool_calls(value: object, at: Context) -> list[dict[str, Any]]:
    """Return tool calls as transformers' templates take them: given as a list or as one, as objects or as JSON."""
    value = from_json(value, _CALL, at)
    if not value:
        return []
    calls = value if isinstance(value, list) else [value]
    return [_tool_call(from_json(call, _CALL, at), at) for call in calls]


def _tool_call(call: object, at: Context) -> dict[str, Any]:
    whole = dict(call) if isinstance(call, Mapping) else {}
    if not isinstance(whole.get("function"), Mapping):
        # The bare form {"name": ..., "arguments": ...}.
        bare = {name: whole.pop(name) for name in ("name", *_NAMES_OF_ARGUMENTS) if name in whole}
        whole = {**whole, "type": "function", "function": bare}
    function = dict(whole["function"])
    if not function.get("name") or not isinstance(function["name"], str):
        raise at.error(f"{_CALL}, got {shown(call)}.")
    function["arguments"] = _arguments(take_first(function, *_NAMES_OF_ARGUMENTS))
    return {**whole, "function": function}


def _arguments(value: object) -> object:
    """Return arguments as an object where they are one: templates write JSON, and a text would be encoded twice."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    try:
        inside = json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError):
        return value
    return inside if isinstance(inside, dict) else value
