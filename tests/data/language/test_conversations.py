import json
from collections import Counter

import pytest

from lora_lightning.data.language.conversations import sample_from
from lora_lightning.data.sources import Record, read_records
from lora_lightning.errors import DataError
from tests.data.talk import turns, write_lines


def sample(fields, **settings):
    return sample_from(Record("talk.jsonl", 3, "line", fields), **settings)


def said(fields, **settings):
    return [(one.role, one.content, one.trained) for one in sample(fields, **settings).messages]


def test_every_shape_says_the_same():
    expected = [("user", "1 + 1", False), ("assistant", "2", True)]
    assert said({"messages": turns("1 + 1", "2")}) == expected
    assert said({"conversations": [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}]}) == expected
    assert said({"prompt": "1 + 1", "completion": "2"}) == expected
    assert said({"prompt": turns("1 + 1"), "completion": [{"role": "assistant", "content": "2"}]}) == expected
    assert said({"instruction": "1 + 1", "input": "", "output": "2"}) == expected
    assert said({"dialogue": ["1 + 1 ", "2"]}) == expected
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1"}]
    assert said({"messages": [{"role": "user", "content": parts}, *turns("", "2")[1:]]}) == expected
    assert said({"messages": turns("1 + 1", "3")}) != expected  # control


def test_what_else_shapes_carry():
    assert said({"instruction": "Add.", "input": "1, 1", "output": "2"})[0] == ("user", "Add.\n\n1, 1", False)
    assert sample({"prompt": "a ", "completion": "b"}).plain == ("a ", "b")
    assert sample({"text": "plain words"}).text == "plain words"
    context = [*turns("q", "old"), {"role": "user", "content": "again"}]
    trained = [one[2] for one in said({"prompt": context, "completion": [{"role": "assistant", "content": "new"}]})]
    assert trained == [False, False, False, True]
    weighed = turns("a", "b", "c", "d")
    weighed[1]["weight"] = 0
    assert [one[2] for one in said({"messages": weighed})] == [False, False, False, True]
    assert said({"question": "q", "reply": "r"}, columns={"prompt": "question", "completion": "reply"})[0][1] == "q"


def test_nothing_to_learn_is_left_out():
    for fields in (
        {"prompt": "q", "completion": " "},
        {"instruction": "q", "output": None},
        {"text": "\n"},
        {"messages": turns("q", "")},
        {"dialogue": ["a question that nobody answers"]},
    ):
        assert sample(fields) is None
    assert [one[1] for one in said({"dialogue": ["a", "b", "c"]})] == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "hi"}, "messages must be a list of turns, got 'hi'"),
        ({"messages": [{"content": "hi"}]}, "turn 1: the role is missing; expected one of system, user"),
        ({"messages": [{"role": "boss", "content": "hi"}]}, "turn 1: the role 'boss' is unknown"),
        ({"messages": [{"role": "user"}]}, "turn 1: the content is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a text, got int"),
        ({"messages": ["hi"]}, "turn 1: expected an object with role and content, got 'hi'"),
        ({"messages": turns("hi")}, "no turn is the assistant's"),
        ({"prompt": turns("hi"), "completion": turns("ho")}, "no turn of the completion is the assistant's"),
        (
            {"prompt": "q", "completion": 7},
            "prompt and completion must both be texts, or both lists of turns; got str and int",
        ),
        ({"question": "q"}, "expected messages .* or text; got the fields question"),
        ({}, "got no fields"),
    ],
)
def test_malformed_records_are_told_with_their_line(fields, message):
    with pytest.raises(DataError, match=rf"^talk\.jsonl, line 3.*{message}") as caught:
        sample(fields)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_there():
    with pytest.raises(
        DataError, match=r"no field 'questoin', which columns names for prompt\. Did you mean 'question'"
    ):
        sample({"question": "q"}, columns={"prompt": "questoin"})


def test_groups_are_first_questions():
    assert (
        sample({"messages": turns("What  is\nIT?", "a")}).group
        == sample({"prompt": "what is it? ", "completion": "b"}).group
    )
    assert sample({"messages": turns("Who?", "a")}).group != sample({"messages": turns("What?", "a")}).group


# Nothing is lost in silence.

CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Rome"}}}
TALK = [("user", "q", False), ("assistant", "a", True)]


def ignored(fields, **settings):
    counts = Counter()
    sample_from(Record("talk.jsonl", 3, "line", fields), ignored=counts, **settings)
    return dict(counts)


def test_what_nothing_uses_is_counted_once_a_row():
    messages = [{**turn, "id": index} for index, turn in enumerate(turns("q", "a", "r", "b"))]
    assert ignored({"messages": messages, "source": "web", "topic": None}) == {"messages[].id": 1, "source": 1}
    assert ignored({"messages": turns("q", "a")}) == {}  # control
    parts = [{"type": "text", "text": "q", "cache_control": {"type": "x"}, "image_url": None}]
    assert ignored({"messages": [{"role": "user", "content": parts}, *turns("", "a")[1:]]}) == {
        "messages[].content[].cache_control": 1
    }
    assert ignored({"text": "t", "system": "s"}) == {"system": 1}
    assert ignored({"text": "t", "system": " ", "images": [], "meta": {}, "score": 0}) == {"score": 1}
    assert ignored({"prompt": "p", "question": "q", "completion": "c"}, columns={"prompt": "question"}) == {
        "prompt (replaced by question)": 1
    }
    asked = [{"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "a", "weight": 1}]
    assert ignored({"messages": asked}) == {"messages[].weight": 1}
    asked[0]["weight"] = 0
    assert ignored({"messages": asked}) == {}
    assert ignored({"prompt": "p", "completion": None, "text": "t"}) == {"prompt": 1}
    named = [{**turn, "name": {"first": "Al"}} for turn in turns("q", "a")]
    assert ignored({"messages": named}) == {"messages[].name": 1}
    assert ignored({"dialogue": ["q", "a", "r"]}) == {"a last statement without an answer": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": turns("q", "a")},
        {"prompt": "q", "completion": "a"},
        {"prompt": turns("q"), "completion": [{"role": "assistant", "content": "a"}]},
        {"instruction": "q", "output": "a"},
    ],
)
def test_system_and_tools_beside_a_conversation(fields):
    assert said(fields) == TALK
    assert said({**fields, "system": "Be kind."}) == [("system", "Be kind.", False), *TALK]
    assert said({**fields, "system": " "}) == TALK
    tool = {"type": "function", "function": {"name": "look"}}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        framed = sample({**fields, "tools": tools})
        assert framed.tools == (tool,)
        assert framed.plain == ()
    for tools in ([], "", "[]", None):
        assert sample({**fields, "tools": tools}).tools == ()
    for tools, message in (("look", "not valid JSON"), ({"a": 1}, "must be a list"), ([3], "one of them is '3'")):
        with pytest.raises(DataError, match=rf"^talk\.jsonl, line 3: .*{message}"):
            sample({**fields, "tools": tools})


def test_a_second_system_message():
    messages = turns("q", "a", system="Be kind.")
    assert said({"messages": messages, "system": "Be kind."}) == [("system", "Be kind.", False), *TALK]
    with pytest.raises(DataError, match="give different system messages"):
        sample({"messages": messages, "system": "Be rude."})


def test_alpacas_history_is_learnt():
    fields = {"instruction": "q", "input": "", "output": "a"}
    history = [["o", "p"], ["r", ""]]
    earlier = [("user", "o", False), ("assistant", "p", True), ("user", "r", False), ("assistant", "", False)]
    assert said({**fields, "history": history}) == [*earlier, *TALK]
    assert said({**fields, "history": json.dumps(history)}) == [*earlier, *TALK]
    assert said({**fields, "history": []}) == said({**fields, "history": ""}) == TALK
    for wrong in ([["o"]], ["op"], {"o": "p"}, [["o", 3]], "op"):
        with pytest.raises(DataError, match="line 3: history"):
            sample({**fields, "history": wrong})


@pytest.mark.parametrize("name", ["weight", "train", "training", "trainable", "loss", "loss_mask"])
def test_marks_of_turns(name):
    def learnt_with(value):
        return said({"messages": [turns("q")[0], {"role": "assistant", "content": "a", name: value}]})[1][2]

    assert not any(learnt_with(value) for value in (0, 0.0, False, "0", "false", "False"))
    assert all(learnt_with(value) for value in (1, 1.0, True, "1", "true", None))
    for value in (0.5, [0, 1], "some", 2):
        with pytest.raises(DataError, match=rf"turn 2: {name} is .*weights between them, .* are not supported"):
            learnt_with(value)
    with pytest.raises(DataError, match=r"turn 2: .* contradict each other"):
        sample(
            {"messages": [turns("q")[0], {"role": "assistant", "content": "a", name: 0, "name": "x", **_other(name)}]}
        )


def _other(name):
    return {"weight" if name != "weight" else "train": 1}


def test_a_blank_turn_is_never_learnt():
    assert [one[2] for one in said({"messages": turns("q", "", "r", "a")})] == [False, False, False, True]


def test_tool_calls_in_the_forms_in_use():
    def calls(turn):
        return sample({"messages": [*turns("q"), turn]}).messages[1]

    bare = CALL["function"]
    text = {"type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}
    for value in ([CALL], json.dumps([CALL]), [json.dumps(CALL)], [bare], [text], bare):
        made = calls({"role": "assistant", "tool_calls": value})
        assert made.extra["tool_calls"] == [CALL]
        assert made.trained
    for value in (bare, json.dumps(bare), [bare]):
        made = calls({"from": "function_call", "value": value})
        assert (made.role, made.content, made.extra["tool_calls"]) == ("assistant", "", [CALL])
    assert calls({"role": "assistant", "content": "a", "tool_calls": []}).extra == {}
    free = calls({"role": "assistant", "tool_calls": [{"name": "look", "arguments": "Rome"}]})
    assert free.extra["tool_calls"][0]["function"]["arguments"] == "Rome"
    # An explicit null is a value.
    null = calls({"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"city": None}}]})
    assert null.extra["tool_calls"][0]["function"]["arguments"] == {"city": None}
    for wrong in ("look", [3], [{"arguments": {}}], [{"name": ""}]):
        with pytest.raises(DataError, match=r"turn 2: .*tool call"):
            calls({"role": "assistant", "tool_calls": wrong})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_have_one_name(name):
    turn = {"role": "assistant", "content": "a", name: "because"}
    assert sample({"messages": [*turns("q"), turn]}).messages[1].extra == {"reasoning_content": "because"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "u"}},
        {"type": "input_audio", "text": "said"},
        {"type": "image_url", "text": None, "image_url": {"url": "u"}},
        {"type": "text", "text": None},
        "q",
    ],
)
def test_content_that_is_no_text_is_refused(part):
    with pytest.raises(DataError, match=r"turn 1, part 2: content of the type .* expected text parts only"):
        sample({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, part]}, turns("", "a")[1]]})


def test_cells_of_csv_files():
    blank = {"system": "", "tools": "", "history": "", "input": ""}
    assert said({"messages": json.dumps(turns("q", "a")), **blank}) == TALK
    assert said({"instruction": "q", "output": "a", **blank}) == TALK
    assert sample({"prompt": "q", "completion": "a", **blank}).plain == ("q", "a")
    assert sample({"prompt": "[q]", "completion": "[a]"}).plain == ("[q]", "[a]")
    for wrong, message in (("hi", "must be a list of turns"), ("[hi", "not valid JSON")):
        with pytest.raises(DataError, match=message):
            sample({"messages": wrong})


def test_columns_may_change_places():
    assert said({"prompt": "a", "completion": "q"}, columns={"prompt": "completion", "completion": "prompt"}) == TALK


# Records.


def fields_of(source, **settings):
    return [dict(record.fields) for record in read_records(str(source), **settings)]


def test_files_are_read_alike(tmp_path):
    import pandas as pd

    records = [{"messages": turns(f"q{index}", f"a{index}")} for index in range(5)]
    lines = write_lines(tmp_path / "a.jsonl", [*records[:2], "", *records[2:]])
    array = tmp_path / "a.json"
    array.write_bytes(b"\xef\xbb\xbf" + str(records).replace("'", '"').encode())
    pd.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    assert fields_of(lines) == fields_of(array) == fields_of(tmp_path / "a.parquet") == records
    assert [one.place.rpartition(", ")[2] for one in read_records(lines)] == [f"line {n}" for n in (1, 2, 4, 5, 6)]
    folder = tmp_path / "both"
    folder.mkdir()
    write_lines(folder / "1.jsonl", records[:3])
    write_lines(folder / "2.jsonl", records[3:])
    assert fields_of(folder) == records
    assert fields_of(folder, share=(1, 2)) == records[1::2]


def test_lines_that_are_not_wanted_are_not_parsed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, "{broken", {"text": "b"}])
    assert fields_of(path, share=(0, 2)) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: this is not valid JSON \(.*\); expected one object a line"):
        fields_of(path)


def test_yaml_dialogues_keep_texts_as_written(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text("categories:\n- a\nconversations:\n- - Is it?\n  - Yes\n- - How many?\n  - 2.50\n- lost\n")
    assert [one["dialogue"] for one in fields_of(path)] == [["Is it?", "Yes"], ["How many?", "2.50"], ["lost"]]
    assert [one.number for one in read_records(str(path))] == [4, 6, 8]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2: expected an object such as .*, got '\[1\]'"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"is not utf-8 \(byte 10, line 1\)"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.parquet", b"no table", "cannot be read as Parquet"),
        ("a.yml", b"conversations: [a\n", "line .*: this is not valid YAML"),
        ("a.yml", b"- a\n", "holds no dialogues"),
        # These two would crash the process inside libyaml.
        ("a.yml", b"conversations:\n- " + b"[" * 200_000, "line 2: nested more than 64 levels deep"),
        ("a.yml", b"{conversations: " * 30_000, "line 1: nested more than 64 levels deep"),
        ("a.txt", b"hi", r"of an unknown kind: expected a name that ends in \.csv"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        fields_of(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"does not exist; the nearest names there: train\.jsonl"):
        fields_of(tmp_path / "trian.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no texts: expected .* or files that end in"):
        fields_of(tmp_path / "empty")


@pytest.mark.parametrize("name", ["arguments", "parameters", "input"])
def test_arguments_of_tool_calls_under_the_names_in_use(name):
    call = {"name": "look", name: {"city": "Rome"}}
    for given in (call, {"type": "tool_use", **call}, {"function": call}, json.dumps(call)):
        record = {"messages": [*turns("q"), {"role": "assistant", "tool_calls": [given]}]}
        (found,) = sample_from(Record("a.jsonl", 1, "line", record)).messages[1].extra["tool_calls"]
        assert found["function"] == {"name": "look", "arguments": {"city": "Rome"}}
        assert ignored(record) == {}
    assert found["type"] == "function"


def test_functions_are_tools():
    tools = [{"name": "look", "description": "Look it up."}]
    record = {"messages": turns("q", "a"), "functions": tools}
    assert sample_from(Record("a.jsonl", 1, "line", record)).tools == tuple(tools)
    assert ignored(record) == {}
    assert ignored({**record, "tools": tools}) == {"functions": 1}
