"""Read one turn of a conversation: its role, its words, its tool calls and whether it is to be learnt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_lightning.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# The names that ShareGPT files and other exports give the roles.
_ROLE_OF = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
_MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MEANING_OF_MARK = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


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


class Fields:
    """The values of a record or a turn; remembers which were taken. A value of None is an absent field."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in fields.items() if value is not None}
        self._names = tuple(map(str, fields))

    def __contains__(self, name: str) -> bool:
        """Return whether there is a value that was not taken yet."""
        return name in self._left

    def take(self, name: str) -> Any:  # noqa: ANN401 - whatever the record holds
        """Return a field's value, or None; it no longer counts as ignored."""
        return self._left.pop(name, None)

    def left(self) -> Iterable[str]:
        """Return the names of the fields that were not taken."""
        return map(str, self._left)

    def shown(self) -> str:
        """Return all names, for messages."""
        return f"the fields {', '.join(self._names[:12])}" if self._names else "no fields"


def message_from(turn: object, place: str, ignored: set[str], path: str) -> Message:
    """Read a turn.

    Args:
        turn: The turn: an object with role (or from) and content (or value).
        place: Where it stands, as messages begin.
        ignored: Gets the names of keys that nothing uses, such as `messages[].id`.
        path: What those names begin with, such as `messages[]`.

    Raises:
        DataError: The turn is malformed, or holds something that cannot be learnt.
    """
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: expected an object with role and content, got {str(turn)[:40]!r}.")
    keys = Fields(turn)
    given, role = _role(keys, place)
    extra = _extra(keys, place)
    content = keys.take("content" if "content" in keys else "value")
    if given == "function_call":
        extra["tool_calls"], content = _tool_calls(content, place), ""
    if content is None and "tool_calls" not in extra:
        raise DataError(f"{place}: the content is missing; expected a text, got {keys.shown()}.")
    words = text_from(content, "content", place, ignored, path)
    mark = _training_mark(keys, place)
    if mark and role != "assistant":
        # Only the assistant's turns are learnt, so a wish to learn another is named among what is ignored.
        ignored.update(f"{path}.{name}" for name in _MARKS if turn.get(name) is not None)
    ignored.update(f"{path}.{name}" for name in keys.left())
    message = Message(role, words, extra=extra)
    # A blank answer would teach the model to end its turn at once.
    trained = role == "assistant" and mark is not False and message.says_something
    return replace(message, trained=trained)


def text_from(value: object, name: str, place: str, ignored: set[str] | None = None, path: str = "") -> str:
    """Return a text; None is an empty one, and a list of text parts is joined.

    Raises:
        DataError: It is of another kind, or one of its parts is no text.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        value = "".join(_part(part, f"{place}, part {number}", ignored, path) for number, part in enumerate(value, 1))
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} must be a text, got {type(value).__name__} ({str(value)[:40]!r}).")
    # Half of a surrogate pair, which JSON can carry, is no character, and tokenizers refuse it.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def parsed(text: str, name: str, place: str) -> Any:  # noqa: ANN401 - whatever the text holds
    """Parse a field that holds JSON as a text.

    Raises:
        DataError: It is not JSON.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place}: {name} is a text that is not valid JSON ({text[:40]!r}).") from error


def tools_from(value: object, place: str) -> tuple[Any, ...]:
    """Read tool descriptions: a list, or a list as JSON text; each an object, or one as JSON text.

    Raises:
        DataError: They are something else.
    """
    if isinstance(value, str) and value.strip():
        value = parsed(value, "tools", place)
    if not value:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{place}: tools must be a list of objects, got {str(value)[:40]!r}.")
    tools = [_parsed_if_text(tool, f"tool {number}", place) for number, tool in enumerate(value, start=1)]
    wrong = next((tool for tool in tools if not isinstance(tool, Mapping)), None)
    if wrong is not None:
        raise DataError(f"{place}: tools must be a list of objects, but one of them is {str(wrong)[:40]!r}.")
    return tuple(tools)


def _role(keys: Fields, place: str) -> tuple[str, str]:
    """Return the role as the turn has it, in lower case, and what we call it."""
    value = keys.take("role" if "role" in keys else "from")
    if value is None:
        raise DataError(f"{place}: the role is missing; expected one of {', '.join(ROLES)}, got {keys.shown()}.")
    given = str(value).lower()
    if given not in _ROLE_OF:
        raise DataError(f"{place}: the role {value!r} is unknown; expected one of {', '.join(ROLES)} (or human, gpt).")
    return given, _ROLE_OF[given]


def _extra(keys: Fields, place: str) -> dict[str, Any]:
    """Return what else chat templates may look at."""
    extra = {name: keys.take(name) for name in ("name", "tool_call_id") if name in keys}
    calls = _tool_calls(keys.take("tool_calls"), place)
    # OpenAI's older files have one call under this name.
    calls += _tool_calls(keys.take("function_call"), place)
    if calls:
        extra["tool_calls"] = calls
    name = next((name for name in _REASONING if name in keys), "")
    thoughts = text_from(keys.take(name), name, place)
    if thoughts.strip():
        extra["reasoning_content"] = thoughts
    return extra


def _tool_calls(value: object, place: str) -> list[dict[str, Any]]:
    """Return tool calls as transformers' templates take them; given as objects, or as JSON texts."""
    if isinstance(value, str) and value.strip():
        value = parsed(value, "the tool call", place)
    if not value:
        return []
    calls = value if isinstance(value, list) else [value]
    return [_tool_call(call, place) for call in calls]


def _tool_call(call: object, place: str) -> dict[str, Any]:
    call = _parsed_if_text(call, "a tool call", place)
    whole = dict(call) if isinstance(call, Mapping) else {}
    if not isinstance(whole.get("function"), Mapping):
        # The bare form {"name": ..., "arguments": ...}.
        bare = {name: whole.pop(name) for name in ("name", "arguments") if name in whole}
        whole = {"type": "function", **whole, "function": bare}
    function = dict(whole["function"])
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(
            f"{place}: a tool call must be an object with the name and arguments of a function, got {str(call)[:40]!r}."
        )
    # Templates write arguments as JSON; a text would be encoded twice.
    function["arguments"] = _arguments(function.get("arguments"))
    return {**whole, "function": function}


def _arguments(value: object) -> object:
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    try:
        inside = json.loads(value) if value.strip() else {}
    except (json.JSONDecodeError, RecursionError):
        return value
    return inside if isinstance(inside, dict) else value


def _training_mark(keys: Fields, place: str) -> bool | None:
    """Return whether a turn is marked to be learnt, or None where nothing says so."""
    marks = {name: keys.take(name) for name in _MARKS if name in keys}
    meant = {name: _MEANING_OF_MARK.get(str(value).strip().lower()) for name, value in marks.items()}
    for name, value in meant.items():
        if value is None:
            raise DataError(
                f"{place}: {name} is {str(marks[name])[:40]!r}; expected 0 or 1 (false or true): weights between them, "
                "or for parts of a turn, are not supported."
            )
    if len(set(meant.values())) > 1:
        raise DataError(f"{place}: {' and '.join(meant)} contradict each other; keep one of them.")
    return next(iter(meant.values()), None)


def _part(part: object, place: str, ignored: set[str] | None, path: str) -> str:
    """Return the text of a content part."""
    keys = Fields(part if isinstance(part, Mapping) else {})
    kind = keys.take("type")
    text = keys.take("text")
    other = next((name for name in keys.left() if name.startswith(("image", "audio", "video", "input_"))), None)
    if kind not in (None, "text") or not isinstance(text, str) or other is not None:
        shown = kind if kind not in (None, "text") else other or str(part)[:40]
        raise DataError(
            f"{place}: content of the type {shown!r} cannot be learnt; expected text parts only, such as "
            '{"type": "text", "text": "..."}.'
        )
    if ignored is not None:
        ignored.update(f"{path}.content[].{name}" for name in keys.left())
    return text


def _parsed_if_text(value: object, name: str, place: str) -> object:
    return parsed(value, name, place) if isinstance(value, str) else value
