"""`PredictionWriter` with tasks, loaders and data modules of users' own."""

from __future__ import annotations

from typing import NamedTuple

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning import LoRA, PredictionWriter
from lora_lightning.errors import ConfigError, DataError
from tests.cli_toys import ToyTask
from tests.predictions.toys import read_lines

NUM_ROWS = 7


class Pair(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


def rows_of(count=NUM_ROWS, start=0):
    return [{"x": torch.full((4,), float(index))} for index in range(start, start + count)]


def sums(batch):
    return batch["x"].sum(1)


ANSWERS = {
    "tensor": (lambda batch: sums(batch), lambda index: {"prediction": 4.0 * index}),
    "bfloat16": (lambda batch: sums(batch).bfloat16(), lambda index: {"prediction": 4.0 * index}),
    "array": (lambda batch: sums(batch).numpy(), lambda index: {"prediction": 4.0 * index}),
    "numbers": (lambda batch: sums(batch).tolist(), lambda index: {"prediction": 4.0 * index}),
    "mapping": (
        lambda batch: {"sum": sums(batch), "both": batch["x"][:, :2].long(), "loss": torch.tensor(1.0), "none": None},
        lambda index: {"predicted_sum": 4.0 * index, "predicted_both": [index, index]},
    ),
    "named": (
        lambda batch: Pair(sums(batch) - 1, sums(batch) + 1),
        lambda index: {"predicted_low": 4.0 * index - 1, "predicted_high": 4.0 * index + 1},
    ),
    "tuple": (
        lambda batch: (sums(batch), ["a"] * len(batch["x"])),
        lambda index: {"predicted_0": 4.0 * index, "predicted_1": "a"},
    ),
    "rows": (
        lambda batch: [{"sum": np.float32(one), "words": ("a", str(int(one)))} for one in sums(batch)],
        lambda index: {"predicted_sum": 4.0 * index, "predicted_words": ["a", str(4 * index)]},
    ),
}


def task_with(answer):
    task = ToyTask(method=LoRA(r=2))
    task.predict = answer
    return task


def run(tmp_path, answer, loaders, path="out.jsonl", **settings):
    writer = PredictionWriter(str(tmp_path / path))
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [writer],
            "default_root_dir": tmp_path,
            **settings,
        }
    )
    given = {"datamodule": loaders} if isinstance(loaders, L.LightningDataModule) else {"dataloaders": loaders}
    trainer.predict(task_with(answer), **given, return_predictions=False)
    return writer


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_a_task_of_ones_own_returns(tmp_path, kind):
    answer, expected = ANSWERS[kind]
    run(tmp_path, answer, DataLoader(rows_of(), batch_size=3))
    rows = read_lines(tmp_path / "out.jsonl")
    assert rows == [{"index": index, **expected(index)} for index in range(NUM_ROWS)]
    assert rows[1] != {"index": 1, **expected(2)}  # control
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_task_may_name_its_columns(tmp_path):
    task = task_with(sums)
    task.prediction_columns = lambda prediction: {"twice": 2 * prediction}
    writer = PredictionWriter(str(tmp_path / "out.csv"))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer])
    trainer.predict(task, DataLoader(rows_of(3)), return_predictions=False)
    assert (tmp_path / "out.csv").read_text() == "index,twice\n0,0.0\n1,8.0\n2,16.0\n"
    assert writer.paths == [tmp_path / "out.csv"]


def test_rows_stand_in_the_order_of_their_data_set(tmp_path):
    order = [4, 0, 6, 2, 5, 1, 3]
    run(tmp_path, sums, DataLoader(rows_of(), batch_size=2, sampler=order))
    assert [row["prediction"] for row in read_lines(tmp_path / "out.jsonl")] == [4.0 * one for one in range(NUM_ROWS)]
    run(tmp_path, sums, DataLoader(rows_of(), batch_size=2, sampler=[3, 1, 3]))  # a row that comes again
    assert [row["index"] for row in read_lines(tmp_path / "out.jsonl")] == [1, 3]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows_of())


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_streams_are_numbered_as_they_come(tmp_path, batch_size):
    answer = sums if batch_size else (lambda batch: [batch["x"].sum()])
    run(tmp_path, answer, DataLoader(Stream(), batch_size=batch_size))
    rows = read_lines(tmp_path / "out.jsonl")
    assert rows == [{"index": index, "prediction": 4.0 * index} for index in range(NUM_ROWS)]


@pytest.mark.parametrize("as_mapping", [True, False])
def test_several_sets_have_a_file_each(tmp_path, as_mapping):
    first, second = DataLoader(rows_of(3), batch_size=2), DataLoader(rows_of(4, start=3), batch_size=2)
    writer = run(tmp_path, sums, {"old": first, "new": second} if as_mapping else [first, second])
    names = ("old", "new") if as_mapping else ("0", "1")
    assert [path.name for path in writer.paths] == [f"out-{name}.jsonl" for name in names]
    found = [[row["prediction"] for row in read_lines(path)] for path in writer.paths]
    assert found == [[0.0, 4.0, 8.0], [12.0, 16.0, 20.0, 24.0]]
    assert [[row["index"] for row in read_lines(path)] for path in writer.paths] == [[0, 1, 2], [0, 1, 2, 3]]


class OwnRows(L.LightningDataModule):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def predict_dataloader(self):
        return DataLoader(rows_of(), batch_size=2)

    def input_rows(self, dataloader_idx):
        return iter(self.rows)


def test_a_data_module_of_ones_own_may_give_the_inputs_columns(tmp_path):
    inputs = [{"name": f"n{index}", "prediction": "old", "index": index * 10} for index in range(NUM_ROWS)]
    run(tmp_path, sums, OwnRows(inputs), "out.csv")
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table.columns) == ["index", "name", "input_prediction", "input_index", "prediction"]
    assert list(table["name"]) == [f"n{index}" for index in range(NUM_ROWS)]
    assert list(table["prediction"]) == [4.0 * index for index in range(NUM_ROWS)]


def test_predictions_are_kept_where_the_input_is_gone(tmp_path):
    inputs = [{"name": f"n{index}"} for index in range(5)]
    told = "written without the columns of the input: input_rows of the data module returned no row for row 5"
    with pytest.warns(UserWarning, match=told):
        run(tmp_path, sums, OwnRows(inputs), "short.csv")
    assert list(pd.read_csv(tmp_path / "short.csv").columns) == ["index", "prediction"]
    assert len(pd.read_csv(tmp_path / "short.csv")) == NUM_ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["short.csv"]


def test_some_batches_give_some_rows_and_a_trial_none(tmp_path):
    loader = DataLoader(rows_of(), batch_size=2)
    run(tmp_path, sums, loader, limit_predict_batches=2)
    assert [row["index"] for row in read_lines(tmp_path / "out.jsonl")] == [0, 1, 2, 3]
    run(tmp_path, sums, loader, "trial.jsonl", fast_dev_run=True)
    assert not (tmp_path / "trial.jsonl").exists()


def test_predictions_that_are_not_one_a_row_are_refused(tmp_path):
    (tmp_path / "out.jsonl").write_text("old\n")
    loader = DataLoader(rows_of(), batch_size=2)
    for answer, told in {
        "a list of 1": lambda _: [0.0],
        r"a tensor of shape \[\]": lambda _: torch.tensor(1.0),
        r"dict \(loss\)": lambda _: {"loss": torch.tensor(1.0)},
        "str": lambda _: "yes",
    }.items():
        with pytest.raises(DataError, match=f"predict_step returned {answer} for a batch of 2 rows"):
            run(tmp_path, told, loader)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "old\n"  # replaced only by a complete one


@pytest.mark.filterwarnings("ignore:predict returned None")
def test_nothing_returned_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"predict_step returned nothing, so that there is no .*out\.jsonl"):
        run(tmp_path, lambda _: None, DataLoader(rows_of(), batch_size=2))
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_no_folder(tmp_path):
    def fails(batch):
        if batch["x"][0, 0] > 3:
            raise IndexError("a bug")
        return sums(batch)

    with pytest.raises(IndexError, match="a bug"):
        run(tmp_path, fails, DataLoader(rows_of(), batch_size=2), "some/where/out.csv")
    assert not list(tmp_path.iterdir())
    run(tmp_path, sums, DataLoader(rows_of(), batch_size=2), "some/where/out.csv")  # control
    assert (tmp_path / "some/where/out.csv").exists()


def test_without_a_name_no_file_is_written_over(tmp_path):
    for _ in range(2):
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
            callbacks=[PredictionWriter()],
        )
        trainer.predict(task_with(sums), DataLoader(rows_of(2)), return_predictions=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions-2.jsonl", "predictions.jsonl"]


def test_an_ending_that_says_no_format_is_refused():
    with pytest.raises(ConfigError, match=r"out\.xlsx has the ending '\.xlsx'; expected one of \.csv, \.jsonl"):
        PredictionWriter("out.xlsx")
