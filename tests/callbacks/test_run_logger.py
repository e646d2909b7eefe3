import csv
from pathlib import Path

import pytest

from lora_lightning.callbacks.places import free_name
from lora_lightning.callbacks.run_logger import RunLogger
from lora_lightning.errors import ConfigError


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_nothing_is_written_before_there_is_something_to_write(tmp_path):
    logger = RunLogger(tmp_path / "runs")
    assert logger.experiment is logger.experiment
    logger.save()
    logger.finalize("failed")
    assert list(tmp_path.iterdir()) == []
    logger.log_metrics({"loss": 0.5}, step=3)
    logger.save()
    assert rows(tmp_path / "runs" / "version_0") == [{"loss": "0.5", "step": "3"}]


def test_hyperparameters_make_the_folder(tmp_path):
    logger = RunLogger(tmp_path)
    logger.log_hyperparams({"r": 8})
    assert (tmp_path / "version_0" / "hparams.yaml").read_text() == "r: 8\n"


def test_versions_count_up(tmp_path):
    for k in range(3):
        logger = RunLogger(tmp_path)
        logger.claim()
        assert Path(logger.log_dir) == tmp_path / f"version_{k}"
        assert Path(logger.log_dir).is_dir()


def test_two_runs_that_start_together_do_not_share_a_folder(tmp_path):
    first, second = RunLogger(tmp_path), RunLogger(tmp_path)
    assert first.log_dir == second.log_dir
    first.claim()
    with pytest.raises(ConfigError, match="taken by another run"):
        second.claim()


def test_a_run_may_claim_its_folder_again(tmp_path):
    logger = RunLogger(tmp_path)
    logger.claim()
    logger.claim()  # reading broken rows takes the folder before training does
    other = RunLogger(tmp_path)
    Path(other.log_dir).mkdir()
    with pytest.raises(ConfigError, match="taken by another run"):
        other.claim()


def test_a_version_of_the_users_is_continued(tmp_path):
    for step, metrics in enumerate([{"loss": 0.5}, {"accuracy": 0.25}]):
        logger = RunLogger(tmp_path, version="mine")
        logger.claim()
        logger.log_metrics(metrics, step=step)
        logger.save()
    assert rows(tmp_path / "mine") == [
        {"accuracy": "", "loss": "0.5", "step": "0"},
        {"accuracy": "0.25", "loss": "", "step": "1"},
    ]


def test_free_name(tmp_path):
    path = tmp_path / "config.yaml"
    names = []
    for _ in range(3):
        free = free_name(path)
        free.touch()
        names.append(free.name)
    assert names == ["config.yaml", "config-2.yaml", "config-3.yaml"]
