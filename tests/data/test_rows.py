import json

import numpy as np
import pandas as pd
import pytest

from lora_lightning.data.conditions import parse_condition
from lora_lightning.data.rows import (
    RowCounts,
    Rows,
    drop_duplicates,
    fingerprint,
    rows_from,
    sorted_labels,
    unlabelled_rows,
)
from lora_lightning.data.tables import Table
from lora_lightning.errors import DataError


def table(**columns):
    return Table("a.csv", pd.DataFrame(columns))


def test_rows_without_text_or_label_are_dropped_and_counted():
    source = table(
        text=["a", None, "c", " \t", "e", "f"],
        label=["x", "x", "", "x", float("nan"), " y "],
        score=[1, 1, 1, 1, 1, 0],
    )
    rows, counts = rows_from(source, "text", "label")
    assert rows == Rows(["a", "f"], ["x", "y"])
    assert counts == RowCounts(read=6, filtered=0, incomplete=4)
    rows, counts = rows_from(source, "text", "label", [parse_condition("score > 0"), parse_condition("score < 9")])
    assert rows == Rows(["a"], ["x"])
    assert counts == RowCounts(read=6, filtered=1, incomplete=4)


def test_all_rows_gone_is_an_error_that_says_why():
    with pytest.raises(DataError, match=r"none of the 1 rows can be used: no row meets score > 5.0 and score < 9.0"):
        rows_from(
            table(text=["a"], label=["x"], score=[1]),
            "text",
            "label",
            [parse_condition("score > 5"), parse_condition("score < 9")],
        )
    with pytest.raises(DataError, match="none has a text and a label"):
        rows_from(table(text=["a", ""], label=["", "x"]), "text", "label")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([3, 1], ["3", "1"]),
        ([True, False], ["True", "False"]),
        ([1.0, None, 0.0], ["1", "0"]),  # whole numbers with a gap, as pandas reads them
        (pd.Series([2, 1], dtype="Int64"), ["2", "1"]),
        (pd.Categorical(["b", "a"]), ["b", "a"]),
        (np.array([True, False]), ["True", "False"]),
    ],
)
def test_labels_of_every_kind_become_names(labels, names):
    rows, _ = rows_from(table(text=["a", "b", "c"][: len(labels)], label=labels), "text", "label")
    assert rows.labels == names


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        ("label", [0.5, 1.0], r"'label' holds fractional numbers \('0.5'\)"),
        ("label", [["x", "y"], ["x"]], "'label' holds a list .* expected one class for each row"),
        ("text", [{"a": 1}, "b"], "'text' holds a dict"),
        ("text", [b"a", "b"], "'text' holds a bytes"),
    ],
)
def test_cells_of_another_kind_are_refused(column, cells, message):
    columns = {"text": ["a", "b"], "label": ["x", "y"], column: cells}
    with pytest.raises(DataError, match=message):
        rows_from(table(**columns), "text", "label")


def test_numbers_are_texts_and_half_characters_are_replaced():
    rows, _ = rows_from(table(text=[12, json.loads('"half \\ud83d é"')], label=["x", "y"]), "text", "label")
    assert rows.texts == ["12", "half ? é"]


def test_unlabelled_rows_keep_every_row_in_place():
    assert unlabelled_rows(table(text=["b", None, "b"]), "text") == Rows(["b", "", "b"], [])


def test_duplicates_keep_the_first_and_contradictions_none():
    rows = Rows(["a", "b", "a", "c", "d", "c", "c"], ["0", "1", "0", "0", "1", "1", "0"])
    kept, duplicates, contradictory = drop_duplicates(rows)
    assert kept == Rows(["a", "b", "d"], ["0", "1", "1"])
    assert (duplicates, contradictory) == (1, 3)
    assert len(kept) + duplicates + contradictory == len(rows)
    assert drop_duplicates(Rows(["a", "A", "a "], ["0", "1", "0"]))[0].texts == ["a", "A", "a "]  # exact copies only


def test_labels_sort_by_number_only_if_all_are_numbers():
    assert sorted_labels(["10", "2", "-1", "2"]) == ["-1", "2", "10"]
    assert sorted_labels(["10", "2", "x"]) == ["10", "2", "x"]
    assert sorted_labels(["01", "1"]) == sorted_labels(["1", "01"])


def test_fingerprint_changes_with_every_part():
    splits = {"train": Rows(["a", "b"], ["0", "1"]), "val": Rows(["c"], ["0"])}
    own = fingerprint(splits, ["0", "1"])
    assert own == fingerprint(dict(reversed(splits.items())), ["0", "1"])
    assert len(own) == 64
    others = [
        fingerprint(splits, ["1", "0"]),
        fingerprint({**splits, "val": Rows(["c"], ["1"])}, ["0", "1"]),
        fingerprint({**splits, "val": Rows(["c "], ["0"])}, ["0", "1"]),
        fingerprint({"train": splits["train"], "test": splits["val"]}, ["0", "1"]),
        fingerprint({**splits, "train": Rows(["b", "a"], ["1", "0"])}, ["0", "1"]),
    ]
    assert len({own, *others}) == 6
