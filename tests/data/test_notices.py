"""Warnings about rows that an earlier run, or another process, has read and encoded."""

import json
import warnings

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lora_lightning.data import InstructionData, TextClassificationData
from lora_lightning.errors import DataError
from tests.data.talk import turns

QUOTED = 'text,label\n"w1,a\nw2,b\nw3,a\n",b\nw4,a\n'
SEVERAL = "text,label\n" + "".join(f"w{n},{'a;b' if n % 2 else 'a'}\n" for n in range(1, 9))
PLAIN = "text,label\nw1,a\nw2,b\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(tmp_path / "own_cache"))


@pytest.fixture
def put(tmp_path):
    """Put a text into a file."""

    def _put(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return _put


def told(make):
    """The warnings of a start."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make().setup("fit")
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("content", "expected"), [(QUOTED, "line 2: a quoted text holds lines"), (SEVERAL, "'a;b'"), (PLAIN, None)]
)
@pytest.mark.parametrize("cache", [True, False])
def test_each_start_tells_them_once(put, tokenizer_folder, content, expected, cache):
    source = put("rows.csv", content)

    def make():
        return TextClassificationData(source, tokenizer=tokenizer_folder, val_size=0, test_size=0, cache=cache)

    first, second = told(make), told(make)
    assert first == second
    assert [expected in one for one in first] == ([True] if expected else [])


def test_they_are_told_where_another_rank_read_the_rows(put, tokenizer_folder, monkeypatch):
    train, val = put("rows.csv", PLAIN), put("val.csv", "text,label\nw1,a\n")

    def make():
        return TextClassificationData(train, val=val, tokenizer=tokenizer_folder, test_size=0)

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert told(make) == []
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    (message,) = told(make)
    assert message.startswith("1 of 1 rows of")


def test_those_of_a_template_are_told_too(put, folder):
    template = put(
        "opening.jinja",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
    )
    source = put("talk.jsonl", json.dumps({"messages": turns("q", "4")}))

    def make():
        return InstructionData(source, tokenizer=folder, template=template, val_size=0)

    first, second = told(make), told(make)
    assert first == second
    assert ["begins answers in another way" in one for one in first] == [True]


def test_they_are_told_before_an_error(put, tokenizer_folder):
    source = put("rows.csv", QUOTED + '"w5" x,a\n')
    with pytest.warns(UserWarning, match="a quoted text holds lines"), pytest.raises(DataError, match="line 7"):
        TextClassificationData(source, tokenizer=tokenizer_folder).setup("fit")
