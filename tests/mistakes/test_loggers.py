"""Loggers of other services, named in one line: they write locally, and the run keeps a folder of its own."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.bench import CKPT, FIT

pytestmark = pytest.mark.slow  # each run is a process of its own
REPOSITORY = Path(__file__).parent.parent.parent
FIGURES = {"val/loss", "val/f1", "val/accuracy", "train/loss"}


def run(*arguments: str, **environment: str) -> str:
    """Run the command in a process of its own, since these loggers keep threads and files open."""
    command = [sys.executable, "-m", "lora_lightning", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    result = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def assert_run_has_its_folder() -> None:
    folder = Path("runs/version_0")
    assert {"config.yaml", "checkpoints", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    assert not Path("config.yaml").exists()
    with (folder / "metrics.csv").open(newline="") as file:
        assert set(next(csv.reader(file))) >= FIGURES


def test_weights_and_biases_offline(here):
    shown = run(*FIT, "--trainer.logger=WandbLogger", "--trainer.logger.offline=true", WANDB_SILENT="true")
    assert_run_has_its_folder()
    [recorded] = Path("wandb").glob("offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    assert all(figure.encode() in content for figure in FIGURES)
    assert b"val/no-such-figure" not in content
    assert "Traceback" not in shown


def test_mlflow_in_a_local_folder(here):
    run(*FIT, "--trainer.logger=MLFlowLogger")
    assert_run_has_its_folder()
    files = [path for path in Path("mlruns").rglob("*") if path.is_file()]
    for figure in FIGURES:
        [found] = [path for path in files if path.parts[-3:] == ("metrics", *figure.split("/"))]
        value = float(found.read_text().splitlines()[-1].split()[1])
        assert value == pytest.approx(last_value(figure), rel=1e-5)


def last_value(figure: str) -> float:
    with Path("runs/version_0/metrics.csv").open(newline="") as file:
        return [float(row[figure]) for row in csv.DictReader(file) if row[figure]][-1]


def test_last_finds_the_run_of_another_logger(here):
    settings = ["--trainer.logger=MLFlowLogger", "--trainer.max_epochs=2"]
    run(*FIT, settings[0])
    assert Path(CKPT).exists()
    run(*FIT, *settings, "--ckpt_path=last")
    assert list(Path("runs/version_1").rglob("epoch=1-*.ckpt"))
