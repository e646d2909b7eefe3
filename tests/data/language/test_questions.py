"""What a model is asked with a record: everything before the answer, whether one is there or not."""

from __future__ import annotations

import pytest

from lora_lightning.data.language.conversations import sample_from
from lora_lightning.data.language.questions import question_from, without_answer
from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError


def record(**fields):
    return Record("a.jsonl", 3, "line", fields)


def turns(*words):
    return [{"role": ("user", "assistant")[index % 2], "content": word} for index, word in enumerate(words)]


def asked(fields, **columns):
    question = question_from(record(**fields), columns)
    return [(message.role, message.content) for message in question.messages]


SAME = {
    "messages": ({"messages": turns("a")}, {"messages": turns("a", "b")}),
    "several turns": ({"messages": turns("a", "b", "c")}, {"messages": turns("a", "b", "c", "d")}),
    "conversations": (
        {"conversations": [{"from": "human", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ),
    "prompt": ({"prompt": "a"}, {"prompt": "a", "completion": "b"}),
    "blank completion": ({"prompt": "a"}, {"prompt": "a", "completion": ""}),
    "prompt of turns": (
        {"prompt": turns("a", "b", "c")},
        {"prompt": turns("a", "b", "c"), "completion": turns("", "d")[1:]},
    ),
    "alpaca": ({"instruction": "a", "input": "b"}, {"instruction": "a", "input": "b", "output": "c"}),
    "history": (
        {"instruction": "c", "history": [["a", "b"]]},
        {"instruction": "c", "history": [["a", "b"]], "output": "d"},
    ),
    "dialogue": ({"dialogue": ["a", "b", "c"]}, {"dialogue": ["a", "b", "c", "d"]}),
    "text": ({"text": "a b"}, {"text": "a b", "completion": None}),
}


@pytest.mark.parametrize("kind", SAME)
def test_an_answer_that_is_there_is_left_out(kind):
    without, with_answer = SAME[kind]
    question = question_from(record(**without), {})
    assert question == question_from(record(**with_answer), {})
    assert question_from(record(**{**without, "system": "be brief"}), {}) != question or kind == "text"  # control


def test_what_is_asked_is_what_a_sample_to_learn_from_begins_with():
    for _, with_answer in (SAME[kind] for kind in SAME if kind not in ("blank completion", "text")):
        learnt = sample_from(record(**with_answer))
        question = question_from(record(**with_answer), {})
        assert question.messages == learnt.messages[:-1]
        assert without_answer(learnt) == question
        assert without_answer(question) == question


def test_plain_prompts_and_texts_stay_plain():
    assert question_from(record(prompt="a ", completion="b"), {}).plain == ("a ", "")
    assert question_from(record(text="a b"), {}).text == "a b"


def test_columns_may_name_an_answer_that_is_not_there():
    columns = {"prompt": "question", "completion": "reply"}
    assert asked({"question": "a"}, **columns) == [("user", "a")]
    assert asked({"question": "a", "reply": "b"}, **columns) == [("user", "a")]
    with pytest.raises(DataError, match="there is no field 'question'"):
        asked({"reply": "b"}, **columns)


def test_system_and_tools_are_asked_too():
    tool = {"name": "f", "description": "d"}
    question = question_from(record(prompt="a", system="be brief", tools=[tool]), {})
    assert [(one.role, one.content) for one in question.messages] == [("system", "be brief"), ("user", "a")]
    assert question.tools == (tool,)
    assert question.plain == ()


@pytest.mark.parametrize(
    "fields", [{"messages": turns("", "b")[1:]}, {"text": " "}, {"messages": []}, {"id": 3}, {"instruction": " "}]
)
def test_a_record_without_a_question_is_refused(fields):
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: "):
        asked(fields)
