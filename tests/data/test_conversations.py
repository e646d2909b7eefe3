import pytest

from lora_lightning.data.conversations import sample_from
from lora_lightning.data.records import Record, read_records
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
    assert fields_of(folder, wanted=lambda place: place % 2 == 1) == records[1::2]


def test_lines_that_are_not_wanted_are_not_parsed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, "{broken", {"text": "b"}])
    assert fields_of(path, wanted=lambda place: place != 1) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: this is no valid JSON \(.*\); expected one object a line"):
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
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: this is not UTF-8"),
        ("a.jsonl", b"\n\n", "holds no records"),
        ("a.parquet", b"no table", "cannot be read as Parquet"),
        ("a.yml", b"conversations: [a\n", "line .*: this is no valid YAML"),
        ("a.yml", b"- a\n", "holds no dialogues"),
        # These two would crash the process inside libyaml.
        ("a.yml", b"conversations:\n- " + b"[" * 200_000, "line 2: nested more than 64 levels deep"),
        ("a.yml", b"{conversations: " * 30_000, "line 1: nested more than 64 levels deep"),
        ("a.txt", b"hi", r"of an unknown kind: expected a name that ends in \.jsonl"),
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
    with pytest.raises(DataError, match="holds no file that ends in"):
        fields_of(tmp_path / "empty")
