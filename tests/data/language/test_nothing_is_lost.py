"""Whatever a record holds is in the decoded tokens, or counted as ignored, or the record is refused or incomplete."""

import itertools
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lora_lightning.data.language.conversations import sample_from
from lora_lightning.data.language.encoder_setup import build_encoder
from lora_lightning.data.model_facts import ModelFacts
from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError
from tests.data.talk import save_tokenizer

# Writes contents, thoughts, calls and tools, as the templates of reasoning models do.
WRITES_ALL = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "narrator")
MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
EXTRA = ("id", "source", "history", "tools", "system", "topic", "score", "input")


@st.composite
def records(draw):
    """A record of any shape, in which every text is a word that stands nowhere else."""
    numbers = itertools.count(100)

    def word():
        return f"qz{next(numbers)}zq"

    def value(depth=1):
        kinds = ["word", "null", "number", "list", "object"][: 5 if depth else 3]
        kind = draw(st.sampled_from(kinds))
        made = {"word": word, "null": lambda: None, "number": lambda: draw(st.integers(-3, 3))}
        made["list"] = lambda: [value(0) for _ in range(draw(st.integers(0, 2)))]
        made["object"] = lambda: {word(): value(0)}
        return made[kind]()

    def call():
        return {"type": "function", "function": {"name": word(), "arguments": {"city": word()}}}

    def turn(role, names=("role", "content")):
        made = {names[0]: role, names[1]: draw(st.sampled_from([word(), f"{word()} {word()}", "", None]))}
        if draw(st.integers(0, 3)) == 0:
            made["content"] = [{"type": "text", "text": word()}, {"type": "text", "text": word()}]
        if draw(st.booleans()) and role in ("assistant", "gpt"):
            made["tool_calls"] = [call() for _ in range(draw(st.integers(0, 2)))]
        if draw(st.integers(0, 2)) == 0:
            made["reasoning_content"] = draw(st.sampled_from([word(), None]))
        if draw(st.integers(0, 2)) == 0:
            made[draw(st.sampled_from(MARKS))] = draw(st.sampled_from([0, 1, True, False, None]))
        if draw(st.integers(0, 2)) == 0:
            made[draw(st.sampled_from(["name", "id", "mood"]))] = value()
        return made

    def turns(names=("role", "content")):
        usual = [role for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")]
        odd = draw(st.lists(st.sampled_from(ROLES), max_size=4))
        return [turn(role, names) for role in draw(st.sampled_from([usual, odd]))]

    shape = draw(st.sampled_from(["messages", "conversations", "prompt", "turns", "alpaca", "text"]))
    made = {
        "messages": lambda: {"messages": turns()},
        "conversations": lambda: {"conversations": turns(("from", "value"))},
        "prompt": lambda: {"prompt": word(), "completion": draw(st.sampled_from([word(), ""]))},
        "turns": lambda: {"prompt": turns(), "completion": [turn("assistant")]},
        "alpaca": lambda: {"instruction": word(), "input": draw(st.sampled_from([word(), "", None])), "output": word()},
        "text": lambda: {"text": word()},
    }[shape]()
    for name in draw(st.lists(st.sampled_from(EXTRA), unique=True, max_size=3)):
        usual = {"history": [[word(), word()]], "tools": [call()], "system": word()}.get(name)
        made.setdefault(name, usual if usual is not None and draw(st.booleans()) else value())
    return made


def words_in(value, path=""):
    """Each word of a record, with the path of the field that holds it as counts of ignored fields name it."""
    if isinstance(value, dict):
        for name, one in value.items():
            inner = f"{path}.{name}" if path else name
            # A key is lost with its field: its words count to the field that holds the object.
            if name.startswith("qz"):
                yield name, path
            yield from words_in(one, inner)
    elif isinstance(value, list):
        for one in value:
            yield from words_in(
                one, f"{path}[]" if path in ("messages", "conversations", "prompt", "completion") else path
            )
    elif isinstance(value, str):
        yield from ((word, path) for word in value.split() if word.startswith("qz"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=WRITES_ALL)
    return build_encoder(
        folder,
        ModelFacts(),
        template=None,
        train_on="assistant",
        max_length=100_000,
        padding_side="right",
        holds_instructions=bool,
    )


def lost_of(record, encoder):
    """The words of a record that are neither decoded nor counted; None where it is refused or incomplete."""
    ignored = Counter()
    try:
        sample = sample_from(Record("a.jsonl", 1, "line", json.loads(json.dumps(record))), None, ignored)
        if sample is None:
            return None
        encoded = encoder.encode(sample)
    except DataError:
        return None
    if not encoded.pieces:
        return None  # counted as a row without an answer
    text = " ".join(encoder.tokenizer.decode(piece.ids) for piece in encoded.pieces)
    named = {*ignored, *encoded.ignored}
    # What the template leaves out of a turn is counted under one name, whatever the field of the turns is called.
    for field in ("conversations[]", "prompt[]", "completion[]"):
        named |= {name.replace("messages[]", field) for name in encoded.ignored}
    if any(name.startswith("turns after") for name in named):
        named |= {"messages[]", "conversations[]", "prompt[]", "completion[]"}
    return [
        (word, path)
        for word, path in words_in(record)
        if word not in text and not any(path.startswith(name) for name in named)
    ]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(record=records())
def test_every_value_is_used_or_counted_or_the_record_refused(encoder, record):
    lost = lost_of(record, encoder)
    event("refused or incomplete" if lost is None else "learnt")
    assert not lost


def test_the_search_is_not_blind(encoder):
    """Controls: usual records are learnt, and a template that drops something is noticed."""
    plain = {
        "messages": [{"role": "user", "content": "qz1zq"}, {"role": "assistant", "content": "qz2zq"}],
        "id": "qz3zq",
    }
    assert lost_of(plain, encoder) == []
    assert list(words_in(plain)) == [("qz1zq", "messages[].content"), ("qz2zq", "messages[].content"), ("qz3zq", "id")]
    hidden = {**plain, "messages": [*plain["messages"], {"role": "assistant", "content": "qz4zq", "train": False}]}
    assert lost_of({"text": "qz5zq", "topic": "qz6zq"}, encoder) == []
    assert lost_of(hidden, encoder) == []
