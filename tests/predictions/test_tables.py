"""Files of predictions in each format, and the parts of ranks that they are made of."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from lora_lightning.callbacks.predictions.parts import Part, in_order
from lora_lightning.callbacks.predictions.tables import write_table
from tests.predictions.toys import read_lines

ODD = [
    (0, {"text": 'a "b",\nc', "n": 1, "list": [1, 2]}, {"label": "yes", "p": 0.5}),
    (1, {"text": "Ä\ud800", "n": None, "list": []}, {"label": None, "p": 1}),
    (2, {"text": "", "extra": True, "list": [{"a": 1}]}, {"label": "no", "p": None}),
]


def test_csv(tmp_path):
    path = tmp_path / "x.csv"
    assert write_table(path, iter(ODD)) == 3
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    assert list(table.columns) == ["index", "text", "n", "list", "extra", "label", "p"]
    assert list(table["text"]) == ['a "b",\nc', "Ä\\ud800", ""]
    assert list(table["n"]) == ["1", "", ""]
    assert [json.loads(cell) for cell in table["list"]] == [[1, 2], [], [{"a": 1}]]
    assert list(table["extra"]) == ["", "", "true"]
    assert list(tmp_path.iterdir()) == [path]


def test_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    write_table(path, iter(ODD))
    assert read_lines(path) == [{"index": index, **fields, **answer} for index, fields, answer in ODD]


def test_parquet_keeps_types_and_writes_mixed_values_as_texts(tmp_path):
    path = tmp_path / "x.parquet"
    write_table(path, iter(ODD))
    table = pq.read_table(path)
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types["index"] == "int64"
    assert types["n"] == "int64"
    assert types["p"] == "double"
    assert types["extra"] == "bool"
    assert types["list"] == "string"
    rows = table.to_pylist()
    assert [row["text"] for row in rows] == ['a "b",\nc', "Ä\\ud800", ""]
    assert [json.loads(row["list"]) for row in rows] == [[1, 2], [], [{"a": 1}]]
    assert [row["p"] for row in rows] == [0.5, 1.0, None]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_many_rows_and_a_column_that_comes_late(tmp_path, ending):
    rows = ((index, {"late": index} if index > 12_000 else {}, {"p": index / 2}) for index in range(12_500))
    path = tmp_path / f"x{ending}"
    assert write_table(path, rows) == 12_500
    table = pd.read_csv(path) if ending == ".csv" else pd.read_parquet(path)
    assert list(table["index"]) == list(range(12_500))
    assert table["late"].isna().sum() == 12_001
    assert table["late"].iloc[-1] == 12_499
    assert table["p"].sum() == sum(range(12_500)) / 2


def test_a_row_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("old")

    def rows():
        yield ODD[0]
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_table(path, rows())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def parts(tmp_path, *lists):
    paths = []
    for rank, rows in enumerate(lists):
        part = Part(tmp_path / f"rank{rank}")
        for key, position, prediction in rows:
            part.add(key, position, prediction)
        part.close()
        paths.append(part.path)
    return paths


def test_ranks_are_joined_by_index_and_copies_dropped(tmp_path):
    paths = parts(
        tmp_path, [(0, 0, "a"), (1, 0, "b"), (4, 0, "e"), (0, 0, "A")], [(2, 0, "c"), (3, 0, "d"), (0, 0, "x")]
    )
    assert list(in_order(paths, are_indices=True)) == list(enumerate("abcde"))
    assert next(in_order(paths[::-1], are_indices=True)) == (0, "x")  # control: the first rank's copy stays


def test_streams_of_ranks_are_joined_batch_by_batch(tmp_path):
    paths = parts(tmp_path, [(0, 0, "a"), (0, 1, "b"), (1, 0, "e")], [(0, 0, "c"), (0, 1, "d")], [])
    assert list(in_order(paths, are_indices=False)) == list(enumerate("abcde"))
