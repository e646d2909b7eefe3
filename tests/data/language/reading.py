"""What an encoder makes of a conversation, for the tests of chat templates."""

from lora_lightning.data.language.conversations import sample_from
from lora_lightning.data.sources import Record
from tests.data.talk import learnt

CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Rome"}}}


def sample(messages, **fields):
    return sample_from(Record("a.jsonl", 1, "line", {"messages": messages, **fields}))


def said(encoder, messages, **fields):
    """What is learnt, for each piece."""
    pieces = encoder.encode(sample(messages, **fields)).pieces
    labels = [[id_ if flag else -100 for id_, flag in zip(one.ids, one.trained, strict=True)] for one in pieces]
    return [learnt(encoder.tokenizer, one.ids, those) for one, those in zip(pieces, labels, strict=True)]


def texts(encoder, messages, **fields):
    return [encoder.tokenizer.decode(one.ids) for one in encoder.encode(sample(messages, **fields)).pieces]
