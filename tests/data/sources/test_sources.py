"""Which files a source consists of, and what they hold together."""

import subprocess
import sys

import pandas as pd
import pytest

from lora_lightning.data.sources import ReadSettings, describe, read_records, source_files
from lora_lightning.errors import ConfigError, DataError
from tests.data.sources.conftest import fields_of, read

TAGGED = "Anna NN B-PER\nruns VB O\n\n\nHi UH O\n"


def names_of(source, **settings):
    return [name for _, name in source_files(source, ReadSettings(**settings))]


def test_shares_are_of_all_files_together(write):
    paths = [write("a.jsonl", '{"n": 0}\n{"n": 1}\n'), write("b.csv", "n\n2\n3\n"), write("c.json", '[{"n": 4}]')]
    paths.append(write("d/e/0.txt", "5").rpartition("/e")[0])
    every = [int(row.get("n", row.get("text"))) for row in fields_of(paths)]
    assert every == [0, 1, 2, 3, 4, 5]
    for mine in range(3):
        found = [int(row.get("n", row.get("text"))) for row in fields_of(paths, share=(mine, 3))]
        assert found == every[mine::3]
    frame = pd.DataFrame({"n": range(5)})
    assert [row["n"] for row in fields_of(frame, share=(1, 2))] == [1, 3]


def test_missing_and_unknown_files(tmp_path, write):
    write("tweets.csv", "text,label\n")
    with pytest.raises(DataError, match=r"tweet\.csv does not exist; the nearest names there: tweets\.csv"):
        read(str(tmp_path / "tweet.csv"))
    with pytest.raises(DataError, match=r"book\.xlsx is of an unknown kind: expected a name that ends in \.csv"):
        read(write("book.xlsx", "x"))
    with pytest.raises(DataError, match=r"empty\.csv is empty \(0 bytes\)"):
        read(write("empty.csv", ""))
    with pytest.raises(DataError, match="of an unknown kind"):
        read(write("a.gz", "x"))


@pytest.mark.parametrize("source", [3, None, [], ("a.csv",), ["a.csv", {"text": "x"}], [{"text": "x"}, 7], {"a": "x"}])
def test_other_sources_are_refused(source):
    with pytest.raises(DataError, match=r"is of an unknown kind: expected a file .*, a folder, a list of files"):
        read(source)


def test_data_in_memory_without_rows_is_refused():
    with pytest.raises(DataError, match=r"a DataFrame of 0 rows holds no rows"):
        read(pd.DataFrame({"text": []}))


def test_lists_of_dicts_are_records():
    rows = [{"text": "x", "n": None}, {"text": "y"}]
    assert fields_of(rows) == rows
    assert [record.place for record in read(rows)] == ["a list of 2 rows, row 1", "a list of 2 rows, row 2"]
    assert describe(["a.csv"]) == "a.csv"
    assert source_files(rows, ReadSettings()) == source_files("imdb", ReadSettings()) == []


def test_reading_text_imports_neither_arrow_nor_datasets(write):
    path = write("a.csv", "text\nx\n")
    program = (
        "import sys; from lora_lightning.data.sources import read_records;"
        f"[*read_records({path!r})]; print([n for n in ('datasets', 'pyarrow') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_records_are_given_one_by_one(write):
    records = read_records(write("a.jsonl", '{"n": 1}\n' * 3))
    assert [next(records).number, next(records).number] == [1, 2]
    records.close()


# Dialogues and words with tags.


def test_yaml_dialogues_keep_texts_as_written(write):
    path = write("a.yml", "categories:\n- a\nconversations:\n- - Is it?\n  - Yes\n- - How many?\n  - 2.50\n- lost\n")
    assert [one["dialogue"] for one in fields_of(path)] == [["Is it?", "Yes"], ["How many?", "2.50"], ["lost"]]
    assert [record.place for record in read(path)] == [f"{path}, line {number}" for number in (4, 6, 8)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"conversations: [a\n", "line .*: this is not valid YAML"),
        (b"conversations: \x00\n", "this is not valid YAML"),
        (b"- a\n", "holds no dialogues"),
        (b"conversations: []\n", "holds no rows"),
        (b"a: b\nc: \xff\n", "is not utf-8 .byte 8, line 2"),
        # These two would crash the process inside libyaml.
        (b"conversations:\n- " + b"[" * 200_000, "line 2: nested more than 64 levels deep"),
        (b"{conversations: " * 30_000, "line 1: nested more than 64 levels deep"),
    ],
)
def test_yaml_that_cannot_be_read(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        fields_of(write("a.yml", content))
    assert "\n" not in str(caught.value)


def test_conll_files_give_sentences(write):
    path = write("a.conll", "-DOCSTART- -X- O\n\n" + TAGGED)
    first, second = read(path, conll=True)
    assert (first.place, second.place) == (f"{path}, line 3", f"{path}, line 7")
    assert second.fields == {"tokens": ["Hi"], "tags": ["O"]}
    assert read(path, conll=True, tag_column=1)[0].fields["tags"] == ["NN", "VB"]
    assert read(path, conll=True, token_column=-2)[0].fields["tokens"] == ["NN", "VB"]
    tabs = write("a.txt", "New York\tB-LOC\n")
    assert fields_of(tabs, conll=True) == [{"tokens": ["New York"], "tags": ["B-LOC"]}]
    with pytest.raises(DataError, match="of an unknown kind"):
        fields_of(tabs)


def test_universal_files_have_columns_of_their_own(write):
    lines = ["# sent_id = 1", "1-2\tisn't\t_\t_", "1\tis\tbe\tAUX", "2\tn't\tnot\tPART", "2.1\t_\t_\t_", ""]
    path = write("a.conllu", "\n".join(lines))
    assert fields_of(path, conll=True) == [{"tokens": ["is", "n't"], "tags": ["AUX", "PART"]}]
    other = write("b.conll", "\n".join(lines[1:]))
    assert fields_of(other, conll=True) != fields_of(path, conll=True)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"a O\n\nb\nc O\n", {}, r"line 3: the token 'b' has no tag"),
        (b"a O\nb\n", {"tag_column": 1}, r"line 2: 1 columns \('b'\), and tag_column is 1"),
        (b"a O\n\xff O\n", {}, "byte 4, line 2"),
        (b"\n\n", {}, "holds no rows"),
    ],
)
def test_broken_sentences(write, content, settings, message):
    with pytest.raises(DataError, match=message):
        fields_of(write("a.iob2", content), conll=True, **settings)


def test_one_share_tells_of_a_broken_sentence(write):
    path = write("a.conll", "a O\n\nb O\nc\n\nd O\n")
    told = {0: [], 1: []}
    words = []
    for mine, bad in told.items():
        note = lambda error, text, bad=bad: bad.append((str(error), text))  # noqa: E731 - bound to its share
        records = read_records(path, ReadSettings(conll=True), on_bad=note, share=(mine, 2))
        words += [record.fields["tokens"] for record in records]
    assert sorted(words) == [["a"], ["d"]]
    assert told[0] == []
    ((message, text),) = told[1]
    assert "line 4: the token 'c' has no tag" in message
    assert text == "b O\nc"


def test_columns_of_conll_files_have_no_names(write):
    with pytest.raises(ConfigError, match=r"tag_column is 'ner', and .* has columns without names"):
        fields_of(write("a.bio", TAGGED), conll=True, tag_column="ner")
