"""Convert records of the usual formats into conversations, prompts with completions, or plain texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_lightning.data.language.turns import Message, message_from
from lora_lightning.data.language.values import (
    Context,
    from_json,
    list_from,
    names_of,
    present,
    shown,
    take_first,
    text_from,
)
from lora_lightning.data.sources import Record
from lora_lightning.paths import nearest


@dataclass(frozen=True)
class Sample:
    """What the model learns from one record: a conversation, or a plain text.

    Args:
        place: Location of the record, as messages begin.
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
        """What samples share that must stay in one split: the first question, or the text."""
        first = next((message.content for message in self.messages if message.role == "user"), self.text)
        return " ".join((first or self.messages[0].content).split()).casefold()

    @property
    def content(self) -> list[Any]:
        """The content of the sample in plain types: equal for copies of a sample."""
        turns = [[message.as_dict(), message.trained] for message in self.messages]
        return [turns, self.text, list(self.plain), list(self.tools)]


def sample_of(content: list[Any], place: str) -> Sample:
    """Return the sample that has this content.

    Args:
        content: What `Sample.content` gave.
        place: Location of the sample, as messages begin.

    Example:
        >>> sample = Sample("a.jsonl, line 1", (Message("user", "Hi", extra={"name": "Al"}),))
        >>> sample_of(sample.content, sample.place) == sample
        True
    """
    turns, text, plain, tools = content
    messages = tuple(Message(extra.pop("role"), extra.pop("content"), trained, extra) for extra, trained in turns)
    return Sample(place, messages, text, tuple(plain), tuple(tools))


def sample_from(
    record: Record, columns: Mapping[str, str] | None = None, ignored: Counter[str] | None = None
) -> Sample | None:
    """Convert a record into a sample; its fields determine its format.

    Args:
        record: The record. A field of None is an absent one.
        columns: For our names of fields (`prompt`, `completion`, ...), the names that the record has instead.
        ignored: Counts the fields that nothing uses, each once for the record: `id`, `messages[].id`.

    Returns:
        The sample, or None for a record of a known format without anything to train on: a blank completion or text, or
        (chatterbot's YAML) a statement without an answer.

    Raises:
        DataError: The format is unknown, or a conversation is malformed.

    Example:
        >>> sample = sample_from(Record("a.jsonl", 1, "line", {"prompt": "1 + 1 =", "completion": " 2"}))
        >>> sample.plain, [message.role for message in sample.messages]
        (('1 + 1 =', ' 2'), ['user', 'assistant'])
    """
    at = Context(record.place)
    fields = _renamed(record.fields, columns or {}, at)
    left = present(fields)
    # Fields with a value go before those without.
    shape = next((shape for names in (left, fields) for shape in _READERS if names.keys() >= set(shape)), None)
    if shape is None:
        raise at.error(
            "expected messages (a list of objects with role and content), conversations (with from and value), prompt "
            f"and completion, instruction and output (with input), or text; got {names_of(fields)}."
        )
    sample = _READERS[shape](left, at)
    at.ignore(left)
    if ignored is not None:
        ignored.update(at.ignored)
    return sample


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str], at: Context) -> dict[str, Any]:
    """Return a record's fields under our names."""
    named = {name: value for name, value in fields.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        if theirs not in fields:
            near = nearest(theirs, fields, count=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise at.error(f"there is no field {theirs!r}, which columns names for {ours}.{hint}")
        if ours in named:
            # The record has a field of our name too: it is kept aside, so that it counts as ignored.
            named[f"{ours} (replaced by {theirs})"] = named[ours]
        named[ours] = fields[theirs]
    return named


# A reader takes the fields that it uses out of a record, and returns None where there is nothing to learn.

_Fields = dict[str, Any]


def _read_text(left: _Fields, at: Context) -> Sample | None:
    text = text_from(left.pop("text", None), "text", at)
    return Sample(at.place, text=text) if text.strip() else None


def _read_turns(left: _Fields, at: Context, *, name: str) -> Sample | None:
    return _conversation(_messages(left.pop(name, None), name, at), left, at)


def _read_prompt(left: _Fields, at: Context) -> Sample | None:
    prompt, completion = left.pop("prompt", None), left.pop("completion", None)
    are_texts = [isinstance(value, str | None) for value in (prompt, completion)]
    if all(are_texts):
        texts = (text_from(prompt, "prompt", at), text_from(completion, "completion", at))
        return _conversation([Message("user", texts[0]), _answer(texts[1])], left, at, plain=texts)
    if any(are_texts):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise at.error(f"prompt and completion must both be texts, or both lists of turns; got {kinds}.")
    context = [replace(message, trained=False) for message in _messages(prompt, "prompt", at)]
    answer = _messages(completion, "completion", at)
    return _conversation([*context, *answer], left, at, num_given=len(context))


def _read_alpaca(left: _Fields, at: Context) -> Sample | None:
    """Read an instruction; answers in its `history` are learnt like any other turn, as in LLaMA-Factory."""
    texts = {name: text_from(left.pop(name, None), name, at) for name in ("instruction", "input", "output")}
    output = texts.pop("output")
    question = "\n\n".join(text for text in texts.values() if text.strip())
    if not output.strip() or not question:
        return None
    messages = []
    for pair in list_from(left.pop("history", None), "history", "pairs of texts", at):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise at.error(
                f"history must be a list of pairs of texts, an instruction and its answer; got {shown(pair)}."
            )
        earlier, answer = (text_from(text, "history", at) for text in pair)
        messages += [Message("user", earlier), _answer(answer)]
    return _conversation([*messages, Message("user", question, extra=texts), _answer(output)], left, at)


def _read_dialogue(left: _Fields, at: Context) -> Sample | None:
    """Read statements that answer one another in turn, without the last one if it has no answer."""
    statements = _turns(left.pop("dialogue", None), "dialogue", at)
    texts = ["" if text is None else str(text).strip() for text in statements]
    pairs = list(zip(texts[::2], texts[1::2], strict=False))
    if not pairs or not all(question and answer for question, answer in pairs):
        return None
    if len(texts) % 2:
        at.ignore(["a last statement without an answer"])
    turns = [(Message("user", question), _answer(answer)) for question, answer in pairs]
    return _conversation([message for pair in turns for message in pair], left, at)


_READERS: dict[tuple[str, ...], Callable[[_Fields, Context], Sample | None]] = {
    ("messages",): partial(_read_turns, name="messages"),
    ("conversations",): partial(_read_turns, name="conversations"),
    ("prompt", "completion"): _read_prompt,
    ("instruction", "output"): _read_alpaca,
    ("text",): _read_text,
    ("dialogue",): _read_dialogue,
}
"""The reader for each set of fields that determines a format, in the order in which they are looked for."""

COLUMNS = (*(name for shape in _READERS for name in shape), "input", "history", "system", "tools")
"""Our names of a record's fields."""


def _answer(text: str) -> Message:
    return Message("assistant", text, trained=bool(text.strip()))


def _turns(value: object, name: str, at: Context) -> Sequence[Any]:
    turns = list_from(value, name, "turns", at)
    if not turns:
        raise at.error("the conversation is empty; expected at least a user's turn and an assistant's.")
    return turns


def _messages(value: object, name: str, at: Context) -> list[Message]:
    turns = enumerate(_turns(value, name, at), start=1)
    return [message_from(turn, at.inside(f"turn {number}", f"{name}[]")) for number, turn in turns]


def _conversation(
    messages: Sequence[Message], left: _Fields, at: Context, *, num_given: int = 0, plain: tuple[str, ...] = ()
) -> Sample | None:
    """Return a conversation with the system prompt and the tools of its record.

    Args:
        messages: The turns.
        left: The record's other fields.
        at: Location of the record.
        num_given: Number of turns at the beginning that are not trained on.
        plain: The prompt and the completion as written; empty for others.
    """
    answers = [message for message in messages[num_given:] if message.role == "assistant"]
    if not answers:
        whose = " of the completion" if num_given else ""
        raise at.error(f"no turn{whose} is the assistant's, so there is nothing to learn; expected one.")
    if not any(message.says_something for message in answers):
        return None
    system = text_from(left.pop("system", None), "system", at)
    # The second name is that of OpenAI's older files.
    given = take_first(left, "tools", "functions")
    tools = tuple(_tool(tool, at) for tool in list_from(given, "tools", "objects", at))
    if system.strip() and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    elif system.strip() and messages[0].content.strip() != system.strip():
        raise at.error(
            "the field system and the conversation's first turn give different system messages; keep one of them."
        )
    # Joined plainly, a prompt and its completion would lose what stands beside them.
    is_alone = not (system.strip() or tools)
    return Sample(at.place, tuple(messages), plain=plain if is_alone else (), tools=tools)


def _tool(value: object, at: Context) -> Mapping[str, Any]:
    tool = from_json(value, "tools must be a list of objects", at)
    if not isinstance(tool, Mapping):
        raise at.error(f"tools must be a list of objects, but one of them is {shown(tool)}.")
    return tool
