"""Two processes write the same file as one, byte by byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.predictions.toys import QUIET, command, fit, predict, save_encoder

ROOT = Path(__file__).parents[2]
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")


def predict_over_two(*words):
    """Run the command in processes of its own, as a shell does."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lora_lightning", "predict", *map(str, words), *QUIET, *TWO],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_texts_in_csv_and_parquet(tmp_path):
    save_encoder(tmp_path / "base")
    rows = [{"text": f"film {index} is {'good' if index % 2 else 'bad'}", "label": index % 2} for index in range(40)]
    pd.DataFrame(rows).to_csv("train.csv", index=False)
    checkpoint = fit(
        *("--model=SequenceClassification", "--model.backbone=base", "--data=TextClassificationData"),
        "--data.train=train.csv",
        epochs=1,
    )
    pd.DataFrame({"text": ["very " * (7 * index % 11) + "film" for index in range(13)]}).to_csv("new.csv", index=False)
    new = "--data.predict=new.csv"
    for size, ending in ((3, "csv"), (50, "parquet")):  # of 50 rows in a batch, one rank has none
        words = (new, f"--data.eval_batch_size={size}")
        predict(checkpoint, *words, f"--output=one.{ending}")
        told = predict_over_two("--ckpt_path", checkpoint, *words, f"--output=two.{ending}")
        assert f"Predictions: 13 rows in two.{ending}" in told
        assert Path(f"one.{ending}").read_bytes() == Path(f"two.{ending}").read_bytes()
    assert list(pd.read_csv("two.csv")["index"]) == list(range(13))
    with pytest.warns(UserWarning, match="11 of 13 predict texts .* were cut"):
        predict(checkpoint, new, "--data.eval_batch_size=3", "--output=other.csv", "--data.max_length=3")
    assert Path("other.csv").read_bytes() != Path("two.csv").read_bytes()  # control
    left = {path.name for path in tmp_path.iterdir() if path.suffix in (".csv", ".parquet") or "rank" in path.name}
    assert left == {"train.csv", "new.csv", "one.csv", "two.csv", "one.parquet", "two.parquet", "other.csv"}


@pytest.mark.slow
def test_a_task_of_ones_own_whose_rows_lightning_shares_out():
    words = (
        *("--model=tests.predictions.own_task.Sums", "--model.method=LoRA", "--model.method.r=2"),
        *("--data=tests.predictions.own_task.Points", "--data.num_points=7", "--data.batch_size=2"),
    )
    command("predict", *words, "--output=one.csv", *QUIET)
    predict_over_two(*words, "--output=two.csv")
    lines = [f"{index},point {index},{4.0 * index}" for index in range(7)]
    assert Path("one.csv").read_text().splitlines() == ["index,name,predicted_sum", *lines]
    assert Path("two.csv").read_bytes() == Path("one.csv").read_bytes()
    command("predict", *words, "--output=other.csv", "--trainer.limit_predict_batches=1", *QUIET)
    assert Path("other.csv").read_text().splitlines() == ["index,name,predicted_sum", *lines[:2]]  # control
