import itertools
import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.batches.columns import (
    EncodedRows,
    ListColumn,
    TableWriter,
    read_batches,
    read_table,
    write_columns,
)

generator = np.random.default_rng(0)
IDS = [generator.integers(0, 99, generator.integers(0, 7)).tolist() for _ in range(25_000)]
LABELS = [index % 3 for index in range(len(IDS))]
SCORES = [index / 7 for index in range(len(IDS))]


def batches(size=4000):
    for start in range(0, len(IDS), size):
        part = slice(start, start + size)
        yield {
            "input_ids": IDS[part],
            "labels": LABELS[part],
            "score": SCORES[part],
            "row": [row // 2 for row in range(len(IDS))[part]],
        }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("columns") / "tokens.arrow"
    write_columns(path, batches())
    return EncodedRows(path)


def test_what_was_written_is_read_back(rows):
    assert len(rows) == len(IDS)
    assert [ids.tolist() for ids in map(rows.columns["input_ids"].__getitem__, range(len(rows)))] == IDS
    assert rows.columns["labels"].tolist() == LABELS
    assert rows.columns["score"].tolist() == np.float32(SCORES).tolist()
    assert rows.lengths.tolist() == list(map(len, IDS))
    assert rows.origins.tolist() == [row // 2 for row in range(len(IDS))]
    last = rows[len(IDS) - 1]
    assert sorted(last) == ["input_ids", "labels", "score"]
    assert (last["input_ids"].tolist(), last["labels"]) == (IDS[-1], LABELS[-1])
    with pytest.raises(IndexError):
        rows[len(IDS)]


def test_rows_in_memory_equal_those_of_a_file(rows):
    own = EncodedRows({"input_ids": IDS, "labels": LABELS, "score": SCORES})
    for index in (0, 1, 9_999, 10_000, len(IDS) - 1):
        assert {name: value.tolist() for name, value in own[index].items()} == {
            name: value.tolist() for name, value in rows[index].items()
        }
    assert own.lengths.tolist() == rows.lengths.tolist()
    assert own.origins.tolist() == list(range(len(IDS)))


def test_lengths_may_be_given():
    rows = EncodedRows({"input_ids": [[1], [2, 3]], "length": [9, 4]})
    assert rows.lengths.tolist() == [9, 4]
    assert "length" not in rows.columns


def test_a_list_column_knows_its_parts():
    column = ListColumn(pa.chunked_array([[[1, 2], []], [], [[3]], [[], [4, 5]]], pa.list_(pa.int32())))
    assert [column[index].tolist() for index in range(5)] == [[1, 2], [], [3], [], [4, 5]]


def test_a_worker_opens_the_file_anew(rows):
    small = pickle.dumps(rows)
    assert len(small) < 1000
    again = pickle.loads(small)
    assert all((again[index]["input_ids"] == IDS[index]).all() for index in range(0, len(IDS), 997))
    assert (again.lengths == rows.lengths).all()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_ids, (rows,)) == IDS[0]


def _first_ids(rows):
    return rows[0]["input_ids"].tolist()


def test_batches_of_workers_are_those_of_one_process(rows):
    def first(num_workers):
        loader = iter(DataLoader(rows, 64, collate_fn=PadToLongest(), num_workers=num_workers))
        return [next(loader) for _ in range(5)]

    for one, other in zip(first(0), first(1), strict=True):
        assert all((one[name] == other[name]).all() for name in ("input_ids", "attention_mask", "labels", "score"))


def test_types_of_the_first_batch_hold_for_all(tmp_path):
    write_columns(tmp_path / "a.arrow", [{"input_ids": [[]], "labels": [0.5]}, {"input_ids": [[1]], "labels": [1]}])
    rows = EncodedRows(tmp_path / "a.arrow")
    assert [row.tolist() for row in (rows[0]["input_ids"], rows[1]["input_ids"])] == [[], [1]]
    assert rows.columns["labels"].tolist() == [0.5, 1]
    assert rows.columns["labels"].dtype == np.float32
    with pytest.raises(AssertionError, match="labels holds fractions"):
        write_columns(tmp_path / "b.arrow", [{"labels": [1]}, {"labels": [0.5]}])


def test_no_rows_leave_no_file(tmp_path):
    write_columns(tmp_path / "a.arrow", [])
    assert list(tmp_path.iterdir()) == []


def test_tables_are_written_in_parts(tmp_path):
    writer = TableWriter(tmp_path / "a.arrow", pa.schema([("n", pa.int64())]))
    for start in (0, 15_000):
        writer.write(pa.table({"n": range(start, start + 15_000)}))
    writer.close()
    parts = [part["n"].to_pylist() for part in read_batches(tmp_path / "a.arrow")]
    assert list(map(len, parts)) == [10_000, 5_000] * 2
    assert list(itertools.chain(*parts)) == list(range(30_000)) == read_table(tmp_path / "a.arrow")["n"].to_pylist()
