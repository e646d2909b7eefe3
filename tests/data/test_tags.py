"""Words and tags as other programs write them: lists as text, numbers, single words, files of `datasets`."""

import datasets
import pytest

from lora_lightning.data import TextClassificationData, TokenClassificationData
from lora_lightning.errors import DataError

ALL_TRAINED = {"val_size": 0, "test_size": 0}
EXPECTED = [(["w1", "w2"], ["O", "B-PER"]), (["w3"], ["O"])]


@pytest.fixture
def build(tmp_path, tokenizer_folder):
    """Read a source, or the content of a file."""

    def _build(source, name="a.csv", **settings):
        if isinstance(source, str) and not source.startswith("/"):
            (tmp_path / name).write_text(source)
            source = str(tmp_path / name)
        data = TokenClassificationData(source, tokenizer=tokenizer_folder, **ALL_TRAINED, **settings)
        data.setup("fit")
        return [(words, tags) for words, tags in data._rows("train")]

    return _build


@pytest.mark.parametrize(
    "rows",
    [
        ["\"['w1', 'w2']\",\"['O', 'B-PER']\"", "\"['w3']\",\"['O']\""],
        ['"[""w1"", ""w2""]","[""O"", ""B-PER""]"', '"[""w3""]","[""O""]"'],
        ["w1 w2,O B-PER", "w3,O"],
    ],
)
def test_lists_that_are_written_as_text(build, rows):
    assert build("\n".join(["tokens,tags", *rows])) == EXPECTED


def test_lists_of_numbers_that_are_written_as_text(build):
    assert build('tokens,tags\nw1 w2,"[0, 1]"\nw3,[0]', tag_names=["O", "B-PER"]) == EXPECTED


def test_what_is_no_list_is_refused_and_a_sentence_in_brackets_is_none(build):
    with pytest.raises(DataError, match=r"line 2: the column 'tokens' holds .* in brackets must be a list"):
        build("tokens,tags\n\"['w1' 'w2']\",O B-PER\nw3,O")
    assert build("tokens,tags\n[ w1 ],O B-PER O\nw3,O")[0] == (["[", "w1", "]"], ["O", "B-PER", "O"])


@pytest.mark.parametrize("tags", ["[0, -100]", "[-1, 0]", "[0, 1]"])
def test_numbers_without_names_are_asked_about(build, tags):
    line = f'{{"tokens": ["w1", "w2"], "tags": {tags}}}'
    with pytest.raises(DataError, match=r"has numbers for tags .* Set tag_names"):
        build(line, "a.jsonl")
    with pytest.raises(DataError, match=r"line 1: the tag .* is neither among tag_names nor the number of one"):
        build(line.replace("1]", "7]").replace("[-1, 0]", "[-1, 7]"), "a.jsonl", tag_names=["O", "B-PER"])


def test_names_that_are_numbers_are_taken_as_they_are(build):
    line = '{"tokens": ["w1", "w2"], "tags": [1, 2]}'
    assert build(line, "a.jsonl", tag_names=[1, 2])[0][1] == ["1", "2"]
    with pytest.raises(DataError, match="the tag '0' is neither among tag_names"):
        build(line.replace("[1, 2]", "[1, 0]"), "a.jsonl", tag_names=[1, 2])


def test_rows_of_one_word_are_warned_of(build):
    with pytest.warns(UserWarning, match="each of its 3 rows has a single word"):
        build("tokens,tags\nw1,O\nw2,B-PER\nw3,O")
    build("tokens,tags\nw1,O\nw2 w4,B-PER O\nw3,O")  # control: warnings are errors


def test_parquet_files_of_datasets_tell_the_names_of_classes(build, tmp_path, tokenizer_folder):
    names = datasets.ClassLabel(names=["O", "B-PER"])
    columns = {"tokens": [["w1", "w2"], ["w3"]], "tags": [[0, 1], [0]], "label": [1, -1], "text": ["w1", "w2"]}
    kinds = {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(names), "label": names}
    features = datasets.Features({**kinds, "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict(columns, features=features)
    path = str(tmp_path / "a.parquet")
    data.to_parquet(path)
    assert build(path) == build(data) == EXPECTED
    data.cast_column("tags", datasets.List(datasets.Value("int64"))).to_parquet(path)
    with pytest.raises(DataError, match="has numbers for tags"):  # control
        build(path)
    texts = TextClassificationData(path, tokenizer=tokenizer_folder, **ALL_TRAINED, problem="multi_label")
    texts.setup("fit")
    assert [one.label for one in texts.examples("train")] == [("B-PER",)]
