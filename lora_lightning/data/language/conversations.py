"""Turn records of the usual shapes into conversations, prompts with completions, or plain texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lightning.data.language.turns import Fields, Message, message_from, parsed, text_from, tools_from
from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError
from lora_lightning.paths import nearest

COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "tools",
    "text",
)
# The fields that tell a record's shape, in the order in which they are looked for.
_SHAPES = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
    ("dialogue",),
)
_SHAPES_IN_WORDS = (
    "messages (a list of objects with role and content), conversations (with from and value), "
    "prompt and completion, instruction and output (with input), or text"
)


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


def sample_from(
    record: Record, columns: Mapping[str, str] | None = None, ignored: Counter[str] | None = None
) -> Sample | None:
    """Turn a record into a sample; its fields determine its shape.

    Args:
        record: The record. A field of None is an absent one.
        columns: For our names of fields (`prompt`, `completion`, ...), the names that the record has instead.
        ignored: Counts the fields that nothing uses, each once for the record: `id`, `messages[].id`.

    Returns:
        The sample, or None for a record that has a known shape and nothing in it to learn from: a blank completion or
        text, or (chatterbot's YAML) a statement without an answer.

    Raises:
        DataError: The shape is none of those known, or a conversation is malformed.

    Example:
        >>> sample = sample_from(Record("a.jsonl", 1, "line", {"prompt": "1 + 1 =", "completion": " 2"}))
        >>> sample.plain, [message.role for message in sample.messages]
        (('1 + 1 =', ' 2'), ['user', 'assistant'])
    """
    named = _renamed(record, columns or {})
    reader = _Reader(record.place, Fields(named))
    sample = reader.read(_shape_of(named))
    if ignored is not None:
        ignored.update({*reader.ignored, *reader.fields.left()})
    return sample


def _renamed(record: Record, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a record's fields under our names."""
    fields = dict(record.fields)
    for ours, theirs in columns.items():
        if theirs not in fields:
            near = nearest(theirs, fields, count=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{record.place}: there is no field {theirs!r}, which columns names for {ours}.{hint}")
    named = {name: value for name, value in fields.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        if ours in named:
            # The record has a field of our name too: it is kept aside, so that it counts as ignored.
            named[f"{ours} (replaced by {theirs})"] = named[ours]
        named[ours] = fields[theirs]
    return named


def _shape_of(fields: Mapping[str, Any]) -> str:
    """Return the first field of the shape that a record has; fields with a value go before those without."""
    present = {name for name, value in fields.items() if value is not None}
    for names in (present, set(fields)):
        for shape in _SHAPES:
            if names.issuperset(shape):
                return shape[0]
    return ""


class _Reader:
    """Reads one record in a given shape, and remembers what it did not use."""

    def __init__(self, place: str, fields: Fields) -> None:
        self.place = place
        self.fields = fields
        self.ignored: set[str] = set()

    def read(self, shape: str) -> Sample | None:
        """Return the sample, or None where there is nothing to learn."""
        if shape in ("messages", "conversations"):
            return self._conversation(shape)
        if shape == "prompt":
            return self._prompt()
        if shape == "instruction":
            return self._alpaca()
        if shape == "text":
            text = text_from(self.fields.take("text"), "text", self.place)
            return Sample(self.place, text=text) if text.strip() else None
        if shape == "dialogue":
            return self._dialogue()
        raise DataError(f"{self.place}: expected {_SHAPES_IN_WORDS}; got {self.fields.shown()}.")

    def _conversation(self, name: str) -> Sample | None:
        turns = self._turns(self.fields.take(name), name)
        messages = [self._message(turn, name, number) for number, turn in enumerate(turns, start=1)]
        answers = [message for message in messages if message.role == "assistant"]
        if not answers:
            raise DataError(f"{self.place}: no turn is the assistant's, so there is nothing to learn; expected one.")
        if not any(message.says_something for message in answers):
            return None
        return self._with_frame(messages)

    def _prompt(self) -> Sample | None:
        prompt, completion = self.fields.take("prompt"), self.fields.take("completion")
        if isinstance(prompt, str | None) and isinstance(completion, str | None):
            texts = (self._text(prompt, "prompt"), self._text(completion, "completion"))
            if not texts[1].strip():
                return None
            return self._with_frame([Message("user", texts[0]), Message("assistant", texts[1], trained=True)], texts)
        if isinstance(prompt, str | None) or isinstance(completion, str | None):
            kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
            raise DataError(
                f"{self.place}: prompt and completion must both be texts, or both lists of turns; got {kinds}."
            )
        context = [self._message(turn, "prompt") for turn in self._turns(prompt, "prompt")]
        context = [Message(one.role, one.content, trained=False, extra=one.extra) for one in context]
        answer = [self._message(turn, "completion") for turn in self._turns(completion, "completion")]
        if not any(message.role == "assistant" for message in answer):
            raise DataError(
                f"{self.place}: no turn of the completion is the assistant's, so there is nothing to learn."
            )
        return self._with_frame([*context, *answer])

    def _alpaca(self) -> Sample | None:
        """Read an instruction; answers in its `history` are learnt like any other turn, as in LLaMA-Factory."""
        names = ("instruction", "input", "output")
        instruction, context, output = (self._text(self.fields.take(name), name) for name in names)
        if not output.strip() or not (instruction.strip() or context.strip()):
            return None
        question = "\n\n".join(part for part in (instruction, context) if part.strip())
        user = Message("user", question, extra={"instruction": instruction, "input": context})
        return self._with_frame([*self._history(), user, Message("assistant", output, trained=True)])

    def _history(self) -> list[Message]:
        value = self.fields.take("history")
        if isinstance(value, str) and value.strip():
            value = parsed(value, "history", self.place)
        pairs = value if isinstance(value, list) else [value] if value else []
        messages: list[Message] = []
        for pair in pairs:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2
            if not is_pair or not all(isinstance(text, str) for text in pair):
                raise DataError(
                    f"{self.place}: history must be a list of pairs of texts, an instruction and its answer; got "
                    f"{str(pair)[:40]!r}."
                )
            question, answer = (self._text(one, "history") for one in pair)
            messages += [Message("user", question), Message("assistant", answer, trained=bool(answer.strip()))]
        return messages

    def _dialogue(self) -> Sample | None:
        """Read statements that answer one another in turn, without the last one if it has no answer."""
        statements = self._turns(self.fields.take("dialogue"), "dialogue")
        answered = list(statements[: len(statements) // 2 * 2])
        if not answered or any(text is None or not str(text).strip() for text in answered):
            return None
        if len(answered) < len(statements):
            self.ignored.add("a last statement without an answer")
        turns = zip(("user", "assistant") * (len(answered) // 2), answered, strict=True)
        return Sample(self.place, tuple(Message(role, str(text).strip(), role == "assistant") for role, text in turns))

    def _with_frame(self, messages: Sequence[Message], plain: tuple[str, ...] = ()) -> Sample:
        """Return a conversation with what stands beside it in the record: the system's words, and tools."""
        system = self._text(self.fields.take("system"), "system")
        tools = tools_from(self.fields.take("tools"), self.place)
        opening = messages[0]
        if system.strip() and opening.role == "system" and opening.content.strip() != system.strip():
            raise DataError(
                f"{self.place}: the field system and the conversation's first turn give different system messages; "
                "keep one of them."
            )
        if system.strip() and opening.role != "system":
            messages = [Message("system", system), *messages]
        # Joined plainly, a prompt and its completion would lose what stands beside them.
        joined = () if system.strip() or tools else plain
        return Sample(self.place, tuple(messages), plain=joined, tools=tools)

    def _turns(self, value: object, name: str) -> Sequence[Any]:
        if isinstance(value, str) and value.lstrip().startswith("["):
            # A cell of a CSV file can hold turns only as JSON.
            value = parsed(value, name, self.place)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise DataError(f"{self.place}: {name} must be a list of turns, got {str(value)[:40]!r}.")
        if not value:
            raise DataError(
                f"{self.place}: the conversation is empty; expected at least a user's turn and an assistant's."
            )
        return value

    def _message(self, turn: object, name: str, number: int | None = None) -> Message:
        where = f"turn {number}" if number else name
        return message_from(turn, f"{self.place}, {where}", self.ignored, f"{name}[]")

    def _text(self, value: object, name: str) -> str:
        return text_from(value, name, self.place)
