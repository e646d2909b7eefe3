import json

import pytest

from lora_lightning.data.rows.cells import Cell, cell_of, check_known, sorted_labels, text_of
from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"a": 1}, "{'a': 1}"),
        (["a"], r"\['a'\]"),
        (b"a", "b'a'"),
        (None, "None"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_cells_of_another_kind_are_refused(cell, message):
    with pytest.raises(DataError, match=rf"a\.csv, line 2: the column 'text' holds {message}; expected a text"):
        text_of(Cell(cell, "text", "a.csv, line 2"))


def test_numbers_are_texts_and_half_characters_are_replaced():
    assert [text_of(Cell(cell, "b", "a")) for cell in (12, 0.5, True, "é")] == ["12", "0.5", "True", "é"]
    assert text_of(Cell(json.loads('"half \\ud83d é"'), "b", "a")) == "half ? é"


def test_cells_are_taken_by_their_column():
    record = Record("a.jsonl", 3, "line", {"texts": None})
    assert cell_of(record, "texts", "text_column") == Cell(None, "texts", "a.jsonl, line 3")
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 has no column 'text', which text_column names.*'texts'"):
        cell_of(record, "text", "text_column")


def test_labels_sort_by_number_only_if_all_are_numbers():
    assert sorted_labels(["10", "2", "-1", "2"]) == ["-1", "2", "10"]
    assert sorted_labels(["10", "2", "x"]) == ["10", "2", "x"]
    assert sorted_labels(["01", "1"]) == sorted_labels(["1", "01"])


def test_labels_that_are_not_known_are_told_with_their_line():
    labels = {"yes": (3, "v.csv, line 2"), "maybe": (1, "v.csv, line 9")}
    check_known(labels, ["no", "yes", "maybe"], "v.csv", "val", "the model does", "labels")
    with pytest.raises(DataError, match=r"v\.csv has labels among its val rows that the model does not have: 'maybe'"):
        check_known(labels, ["no", "yes"], "v.csv", "val", "the model does", "labels")
    with pytest.raises(DataError, match=r"'maybe' \(v\.csv, line 9\); known are 'no', 'yes'\."):
        check_known(labels, ["no", "yes"], "v.csv", "val", "the model does", "labels")
    many = {f"x{index}": (1, "here") for index in range(13)}
    with pytest.raises(DataError, match="and 3 more"):
        check_known(many, ["no"], "v.csv", "val", "the model does", "labels")
