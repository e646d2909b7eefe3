import math

import pytest

from lora_lightning.errors import DataError
from tests.data.sources.conftest import fields_of, read, tolerant


def test_values_keep_their_types(write):
    path = write("a.jsonl", '{"text": "x\u2028y", "label": 1}\n\n{"text": null, "label": true, "n": {"a": null}}\n')
    assert fields_of(path) == [{"text": "x\u2028y", "label": 1}, {"text": None, "label": True, "n": {"a": None}}]
    assert [type(row["label"]) for row in fields_of(path)] == [int, bool]
    assert [record.place for record in read(path)] == [f"{path}, line 1", f"{path}, line 3"]
    odd = fields_of(write("b.jsonl", '\ufeff{"a": NaN, "b": -Infinity, "c": "\\ud800"}'))
    assert math.isnan(odd[0]["a"])
    assert (odd[0]["b"], odd[0]["c"]) == (-math.inf, "\ud800")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("content", ['[{"text": "x"},\n {"text": "y"}]', '\n [\n{"text": "x"},{"text": "y"}\n]\n'])
def test_arrays(write, name, content):
    path = write(name, content)
    assert fields_of(path) == [{"text": "x"}, {"text": "y"}]
    assert [record.place for record in read(path)] == [f"{path}, entry 1", f"{path}, entry 2"]
    assert fields_of(path, share=(1, 2)) == [{"text": "y"}]
    assert fields_of(write("c.json", '[{"text": "x"}, {"n": 1}]')) == [{"text": "x"}, {"n": 1}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"text": "a"}\n\n{"text": oops}\n', r"bad\.jsonl, line 3: this is not valid JSON"),
        ("cut.jsonl", '{"a": 1}\n{"a": 2}\n{"prompt": "x", "completion": \n', r"cut\.jsonl, line 3: this is not valid"),
        ("cut.jsonl", '{"a": 1}\n{"prompt": "x", "completion": \r\n{"a": 1}', r"cut\.jsonl, line 2: this is not valid"),
        ("bad.json", '[{"text": "a"},\n {"text": oops}]', r"bad\.json, line 2: this is not valid JSON"),
        ("bad.json", '\n\n[{"text": "a"},\n\n {"text": oops}]', r"bad\.json, line 5: this is not valid JSON"),
        ("more.json", '[{"text": "a"}]\n{"text": 1}', r"more\.json, line 2: this is not valid JSON \(Extra data"),
        ("list.jsonl", '{"text": "a"}\n["b", 1]\n', r"list\.jsonl, line 2: expected an object such as .* got"),
        ("list.json", '[{"text": "a"}, 7]', r"list\.json, entry 2: expected an object"),
        (
            "twice.jsonl",
            '{"n": 1}\n{"n": {"a": 1, "b": 2, "a": 3}}',
            r"twice\.jsonl, line 2: .*the key 'a' stands twice",
        ),
        ("twice.json", '[{"n": 1, "n": 1}]', r"twice\.json, line 1: .*the key 'n' stands twice"),
        ("deep.jsonl", "[" * 100_000, r"deep\.jsonl, line 1: nested too deeply"),
        ("deep.jsonl", '{"a": 1}\n' + '{"a":' * 100_000, r"deep\.jsonl, line 2: nested too deeply"),
        ("long.jsonl", '{"a": ' + "1" * 5000 + "}", r"long\.jsonl, line 1: this cannot be read as JSON"),
        ("blank.jsonl", "\n\n", "holds no rows"),
        ("none.json", "[]", "holds no rows"),
        ("byte.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"byte 24, line 2"),
        ("byte.json", b'[{"text": "a"},\n{"text": "\xff"}]\n', r"byte 26, line 2"),
    ],
)
def test_malformed_files_are_refused_with_their_line(write, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        fields_of(write(name, content))
    assert "\n" not in str(caught.value)


def test_lines_of_others_shares_are_not_parsed(write):
    path = write("a.jsonl", b'{"text": "a"}\n{broken\n\n{"text": "b"}\n')
    assert fields_of(path, share=(0, 2)) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match="line 2: this is not valid JSON"):
        fields_of(path, share=(1, 2))


def test_broken_lines_are_skipped(write):
    lines = ['{"text": "a"}', "[1]", '{"text": ', '{"text": "b"}', "[{"]
    records, messages, texts = tolerant(write("a.jsonl", "\n".join(lines)))
    assert [record.number for record in records] == [1, 4]
    assert [text.strip() for text in texts] == ["[1]", '{"text":', "[{"]
    assert [f", line {number}:" in one for number, one in zip((2, 3, 5), messages, strict=True)] == [True] * 3


def test_broken_entries_of_an_array_are_skipped(write):
    records, messages, texts = tolerant(write("a.json", '[{"text": "a"}, "x", {"text": "b"}]'))
    assert [record.number for record in records] == [1, 3]
    assert texts == ['"x"']
    assert "entry 2" in messages[0]
