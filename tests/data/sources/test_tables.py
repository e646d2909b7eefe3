"""Parquet files, data sets and data in memory."""

import datetime
import json

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from lora_lightning.data.sources.tables import plain
from lora_lightning.errors import DataError
from tests.data.sources.conftest import compress, fields_of, read

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["neg", "pos"]),
        "tags": datasets.List(datasets.ClassLabel(names=["O", "B"])),
    }
)
LABELLED = datasets.Dataset.from_dict(
    {"text": ["a", "b", "c"], "label": [1, -1, None], "tags": [[0, 1], [], [1]]}, features=FEATURES
)
NAMED = [
    {"text": "a", "label": "pos", "tags": ["O", "B"]},
    {"text": "b", "label": None, "tags": []},
    {"text": "c", "label": None, "tags": ["B"]},
]


def calls(arguments):
    return {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}], "id": None}


PADDED = [calls({"city": "Rome"}), calls({"zone": "UTC", "notes": [None, "x"]})]


@pytest.fixture(params=["parquet", "dataset", "frame"])
def padded(request, tmp_path):
    """Two calls with other arguments each, to which Arrow adds the arguments of the other as nulls."""
    table = pyarrow.Table.from_pylist(PADDED)
    assert "null" in json.dumps(table.to_pylist()[0]["messages"])
    if request.param == "dataset":
        return datasets.Dataset(table)
    if request.param == "frame":
        return table.to_pandas()
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def test_keys_that_arrow_adds_are_dropped(padded):
    assert fields_of(padded) == PADDED
    assert [record.unit for record in read(padded)] == ["row", "row"]


def test_nulls_that_somebody_wrote_stay(write):
    written = [{"a": {"b": None}, "c": [None]}]
    assert fields_of(write("a.json", json.dumps(written))) == written
    assert fields_of(written) == written


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_parquet_equals_what_it_was_made_from(tmp_path, write, suffix):
    rows = [{"text": f"row {index}", "n": index} for index in range(2500)]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    path = write(f"b.parquet{suffix}", compress((tmp_path / "a.parquet").read_bytes(), suffix))
    assert fields_of(path) == rows
    assert read(path)[1999].place == f"{path}, row 2000"
    with pytest.raises(DataError, match="cannot be read"):
        fields_of(write(f"c.parquet{suffix}", compress(b"nonsense", suffix)))


# Data sets.


def test_class_numbers_become_names(tmp_path):
    assert fields_of(LABELLED) == NAMED
    assert fields_of(LABELLED.select([2, 0])) == [NAMED[2], NAMED[0]]
    assert fields_of(LABELLED.with_format("numpy")) == NAMED
    LABELLED.save_to_disk(str(tmp_path / "folder"))
    assert fields_of(tmp_path / "folder") == NAMED
    numbers = LABELLED.cast_column("label", datasets.Value("int64"))
    assert [row["label"] for row in fields_of(numbers)] == [1, -1, None]


def test_class_numbers_within_lists_and_objects_become_names():
    kind = datasets.ClassLabel(names=["O", "B"])
    features = datasets.Features({"deep": datasets.List(datasets.List(kind)), "turns": datasets.List({"kind": kind})})
    cells = {"deep": [[[0, 1], []], None], "turns": [[{"kind": 1}], [{"kind": -1}, {"kind": None}]]}
    assert fields_of(datasets.Dataset.from_dict(cells, features=features)) == [
        {"deep": [["O", "B"], []], "turns": [{"kind": "B"}]},
        {"deep": None, "turns": [{}, {}]},
    ]


def test_saved_data_sets_in_several_files(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [f"row {index}" for index in range(3000)]})
    rows.save_to_disk(str(tmp_path / "folder"), num_shards=12)
    records = read(str(tmp_path / "folder"))
    assert [record.fields["text"] for record in records] == rows["text"][:]
    assert records[250].place == f"{tmp_path}/folder, row 251"


def test_saved_splits_are_chosen_by_role(tmp_path):
    splits = datasets.DatasetDict(train=LABELLED, dev=LABELLED.select([1]))
    splits.save_to_disk(str(tmp_path / "splits"))
    assert fields_of(tmp_path / "splits") == NAMED
    assert fields_of(tmp_path / "splits", "val") == NAMED[1:2]
    with pytest.raises(DataError, match="no split 'test' to use for predict; it has: train, dev"):
        fields_of(tmp_path / "splits", "predict")


# Values.


def test_numpy_and_pandas_become_python():
    value = {"a": np.int64(3), "b": np.array([[1.5], [2.0]]), "c": np.str_("x"), 4: (np.bool_(True), [5])}
    found = plain(value)
    assert json.loads(json.dumps(found)) == found == {"a": 3, "b": [[1.5], [2.0]], "c": "x", "4": [True, [5]]}
    assert type(found["c"]) is str
    assert plain(pd.NaT) is plain(pd.NA) is plain(np.float32("nan")) is None
    assert plain(datetime.datetime(2020, 1, 2)) == "2020-01-02 00:00:00"
    assert plain(b"a") == b"a"  # no text: only who knows the encoding can make one of it


def test_frames_keep_whole_numbers_and_lose_missing_ones():
    frame = pd.DataFrame(
        {
            "whole": [1, 2, 3],
            "gaps": [1, None, 3],
            "real": [1.5, None, 3],
            "exact": [1.0, 2.0, 3.0],
            "text": ["NA", None, float("nan")],
            "day": [pd.Timestamp("2020-01-02"), pd.NaT, pd.NaT],
            "nullable": pd.array([1, None, 3], dtype="Int64"),
            "kind": pd.Categorical(["a", None, "b"]),
        },
        index=[7, 7, 9],
    )
    assert frame["gaps"].dtype == float  # control
    nothing = {"gaps": None, "real": None, "text": None, "day": None, "nullable": None, "kind": None}
    first = {"whole": 1, "gaps": 1, "real": 1.5, "exact": 1.0, "text": "NA", "day": "2020-01-02 00:00:00"}
    last = {"whole": 3, "gaps": 3, "real": 3.0, "exact": 3.0, "text": None, "day": None, "nullable": 3, "kind": "b"}
    found = fields_of(frame)
    assert found == [{**first, "nullable": 1, "kind": "a"}, {"whole": 2, "exact": 2.0, **nothing}, last]
    assert [type(found[0][name]) for name in ("whole", "gaps", "exact", "nullable")] == [int, int, float, int]
    assert [record.place for record in read(frame)] == [f"a DataFrame of 3 rows, row {index}" for index in (1, 2, 3)]


@pytest.mark.parametrize("dtype", ["float32", "Float64", "double[pyarrow]"])
def test_whole_numbers_with_gaps_of_every_type(dtype):
    frame = pd.DataFrame({"gaps": [1, None, 3], "real": [1.5, None, 3], "none": [None, None, None]}, dtype=dtype)
    found = fields_of(frame)
    assert found == [{"gaps": 1, "real": 1.5, "none": None}, dict.fromkeys(frame), {"gaps": 3, "real": 3, "none": None}]
    assert [type(row["gaps"]) for row in found] == [int, type(None), int]
    assert type(found[2]["real"]) is float
    large = pd.DataFrame({"a": [2.0**60, None], "b": [float("inf"), None]}, dtype=dtype)
    assert type(fields_of(large)[0]["a"]) is float
    assert fields_of(large)[0]["b"] == float("inf")


def test_columns_of_one_name_are_numbered():
    frame = pd.DataFrame([[1, "x", 2]], columns=["label", "text", "label"])
    assert fields_of(frame) == [{"label (column 1)": 1, "text": "x", "label (column 3)": 2}]
