"""Turn records of the usual shapes into conversations, prompts with completions, or plain texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_lightning.data.records import Record
from lora_lightning.errors import DataError
from lora_lightning.paths import nearest

ROLES = ("system", "user", "assistant", "tool")
# The names that ShareGPT files and other exports give the roles.
_ROLE_OF = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "tools")
_SHAPES = (
    "messages (a list of objects with role and content), conversations (with from and value), "
    "prompt and completion, instruction and output (with input), or text"
)
_LEFT_TO_TEMPLATES = ("name", "tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: The words.
        trained: Whether its words may be trained on; only an assistant's are.
        extra: Further entries that a chat template may look at.
    """

    role: str
    content: str
    trained: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        return {**self.extra, "role": self.role, "content": self.content}


@dataclass(frozen=True)
class Sample:
    """What one record asks the model to learn: a conversation, or a plain text.

    Args:
        place: Where it stands, as messages begin.
        messages: The turns; empty for a plain text.
        text: The plain text; empty for a conversation.
        plain: The prompt and the completion as written, which are joined where no template is used; empty for others.
        tools: Descriptions of tools, for templates that take them.
    """

    place: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    plain: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()

    @property
    def group(self) -> str:
        """What samples must share to be kept on one side of a split: the first question, or the text."""
        first = next((message.content for message in self.messages if message.role == "user"), self.text)
        return " ".join((first or self.messages[0].content).split()).casefold()

    @property
    def content(self) -> list[Any]:
        """All that the sample says, in plain types: equal for copies of a sample."""
        turns = [[message.as_dict(), message.trained] for message in self.messages]
        return [turns, self.text, list(self.plain), list(self.tools)]


def sample_from(record: Record, columns: Mapping[str, str] | None = None) -> Sample | None:
    """Turn a record into a sample; its shape is told by its fields.

    Args:
        record: The record.
        columns: For our names of fields (`prompt`, `completion`, ...), the names that the record has instead.

    Returns:
        The sample, or None for a record that has a known shape and nothing in it to learn from: a blank completion or
        text, or (chatterbot's YAML) a statement that nobody answers.

    Raises:
        DataError: The shape is none of those known, or a conversation is malformed.

    Example:
        >>> sample = sample_from(Record("a.jsonl", 1, "line", {"prompt": "1 + 1 =", "completion": " 2"}))
        >>> sample.plain, [message.role for message in sample.messages]
        (('1 + 1 =', ' 2'), ['user', 'assistant'])
    """
    fields = dict(record.fields)
    for ours, theirs in (columns or {}).items():
        if theirs not in fields:
            near = nearest(theirs, fields, count=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{record.place}: there is no field {theirs!r}, which columns names for {ours}.{hint}")
        fields[ours] = fields.pop(theirs)
    tools = fields.get("tools")
    tools = tuple(tools) if isinstance(tools, list) else ()
    if "dialogue" in fields:
        return _from_dialogue(fields["dialogue"], record.place)
    for name in ("messages", "conversations"):
        if fields.get(name) is not None:
            return _from_messages(fields[name], name, record.place, tools)
    if "prompt" in fields and "completion" in fields:
        return _from_prompt(fields["prompt"], fields["completion"], record.place, tools)
    if "instruction" in fields and "output" in fields:
        return _from_alpaca(fields, record.place)
    if "text" in fields:
        text = _text(fields["text"], "text", record.place)
        return Sample(record.place, text=text) if text.strip() else None
    raise DataError(f"{record.place}: expected {_SHAPES}; got {_shown(fields)}.")


def _from_messages(value: object, name: str, place: str, tools: tuple[Any, ...]) -> Sample | None:
    turns = _turns(value, name, place)
    messages = tuple(_message(turn, f"{place}, turn {number}") for number, turn in enumerate(turns, start=1))
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{place}: no turn is the assistant's, so there is nothing to learn; expected at least one.")
    answers = [message for message in messages if message.role == "assistant"]
    if not any(message.content.strip() or "tool_calls" in message.extra for message in answers):
        return None
    return Sample(place, messages, tools=tools)


def _turns(value: object, name: str, place: str) -> Sequence[object]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"{place}: {name} must be a list of turns, got {str(value)[:40]!r}.")
    if not value:
        raise DataError(f"{place}: the conversation is empty; expected at least a user's turn and an assistant's.")
    return value


def _message(turn: object, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: expected an object with role and content, got {str(turn)[:40]!r}.")
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise DataError(f"{place}: the role is missing; expected one of {', '.join(ROLES)}, got {_shown(turn)}.")
    known = _ROLE_OF.get(str(role).lower())
    if known is None:
        raise DataError(f"{place}: the role {role!r} is unknown; expected one of {', '.join(ROLES)} (or human, gpt).")
    extra = {name: turn[name] for name in _LEFT_TO_TEMPLATES if turn.get(name) is not None}
    content = turn.get("content", turn.get("value"))
    if content is None and "tool_calls" not in extra:
        raise DataError(f"{place}: the content is missing; expected a text, got {_shown(turn)}.")
    words = _text(content, "content", place)
    # OpenAI's files mark answers that are context only with weight 0.
    trained = known == "assistant" and turn.get("weight") != 0
    return Message(known, words, trained, extra)


def _from_prompt(prompt: object, completion: object, place: str, tools: tuple[Any, ...]) -> Sample | None:
    if isinstance(prompt, str | None) and isinstance(completion, str | None):
        texts = (_text(prompt, "prompt", place), _text(completion, "completion", place))
        if not texts[1].strip():
            return None
        return Sample(place, _question_and_answer(*texts), plain=texts, tools=tools)
    if isinstance(prompt, str | None) or isinstance(completion, str | None):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise DataError(f"{place}: prompt and completion must both be texts, or both lists of turns; got {kinds}.")
    context = [_message(turn, f"{place}, prompt") for turn in _turns(prompt, "prompt", place)]
    context = [Message(one.role, one.content, trained=False, extra=one.extra) for one in context]
    answer = [_message(turn, f"{place}, completion") for turn in _turns(completion, "completion", place)]
    if not any(message.trained for message in answer):
        raise DataError(f"{place}: no turn of the completion is the assistant's, so there is nothing to learn.")
    return Sample(place, (*context, *answer), tools=tools)


def _from_alpaca(fields: Mapping[str, Any], place: str) -> Sample | None:
    instruction, context, output = (_text(fields.get(name), name, place) for name in ("instruction", "input", "output"))
    if not output.strip() or not (instruction.strip() or context.strip()):
        return None
    question = "\n\n".join(part for part in (instruction, context) if part.strip())
    user = Message("user", question, extra={"instruction": instruction, "input": context})
    system = fields.get("system")
    opening = (Message("system", _text(system, "system", place)),) if system else ()
    return Sample(place, (*opening, user, Message("assistant", output, trained=True)))


def _from_dialogue(statements: Sequence[str | None], place: str) -> Sample | None:
    """Read statements that answer one another in turn, the last that nobody answers left out."""
    answered = list(statements[: len(statements) // 2 * 2])
    if not answered or any(text is None or not text.strip() for text in answered):
        return None
    turns = zip(("user", "assistant") * (len(answered) // 2), answered, strict=True)
    return Sample(place, tuple(Message(role, str(text).strip(), role == "assistant") for role, text in turns))


def _question_and_answer(question: str, answer: str) -> tuple[Message, ...]:
    return (Message("user", question), Message("assistant", answer, trained=True))


def _text(value: object, name: str, place: str) -> str:
    """Return a text; None is an empty one, and a list of text parts is joined."""
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "text" in part for part in value):
        value = "".join(str(part["text"]) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} must be a text, got {type(value).__name__} ({str(value)[:40]!r}).")
    # Half of a surrogate pair, which JSON can carry, is no character, and tokenizers refuse it.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _shown(fields: Mapping[str, Any]) -> str:
    return f"the fields {', '.join(map(str, list(fields)[:12]))}" if fields else "no fields"
