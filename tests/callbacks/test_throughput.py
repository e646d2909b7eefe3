"""Samples and tokens a second: counted exactly, timed without validation, read at the log interval only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lora_lightning.callbacks import Throughput, throughput
from lora_lightning.callbacks.throughput import count_samples, count_tokens
from tests.callbacks.runs import BATCH_SIZE, LIGHTNING_WARNINGS, LineData, LineTask, fit

pytestmark = LIGHTNING_WARNINGS


class Clock:
    """A clock that training and validation move by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TickingTask(LineTask):
    """Takes half a second for a training step, and a hundred for one of validation."""

    clock: Clock

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += 0.5
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 100
        super().validation_step(batch, batch_idx)


def column(folder: Path, name: str) -> list[float]:
    rows = (folder / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    index = rows[0].split(",").index(name)
    return [float(row.split(",")[index]) for row in rows[1:] if row.split(",")[index]]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> TickingTask:
    task = TickingTask()
    task.clock = Clock()
    monkeypatch.setattr(throughput, "time", task.clock)
    return task


def test_rates(tmp_path: Path, task: TickingTask) -> None:
    fit(tmp_path, Throughput(), task=task)
    samples, tokens = (column(tmp_path, f"train/{name}_per_second") for name in ("samples", "tokens"))
    assert len(samples) == 6
    assert samples == pytest.approx([BATCH_SIZE / 0.5] * 6)
    assert tokens == pytest.approx([3 * BATCH_SIZE / 0.5] * 6)  # 3 of 5 positions count


def test_accumulation(tmp_path: Path, task: TickingTask) -> None:
    fit(tmp_path, Throughput(), task=task, accumulate_grad_batches=3, log_every_n_steps=1)
    assert column(tmp_path, "train/samples_per_second") == pytest.approx([BATCH_SIZE / 0.5] * 4)


def test_reads_the_device_at_the_log_interval_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    class Counting(Throughput):
        def _log(self, pl_module: L.LightningModule) -> None:
            reads.append(pl_module.trainer.global_step)
            assert isinstance(self._num_tokens, Tensor)
            super()._log(pl_module)

    fit(tmp_path, Counting(), log_every_n_steps=4)
    assert reads == [4, 8, 12]


def test_without_a_mask_samples_alone(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Throughput(), data=LineData(with_mask=False))
    assert "train/samples_per_second" in trainer.logged_metrics
    assert "train/tokens_per_second" not in trainer.logged_metrics


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(3, 2), 3),
        (torch.tensor(1.0), 1),
        ([torch.zeros(2), torch.zeros(2)], 2),
        ({"texts": ["a", "b"], "x": torch.zeros(5, 1)}, 5),
        ("text", 0),
        (7, 0),
        ({}, 0),
    ],
)
def test_count_samples(batch: Any, expected: int) -> None:
    assert count_samples(batch) == expected


def test_count_tokens() -> None:
    assert count_tokens([torch.zeros(2)]) is None
    assert count_tokens({"attention_mask": None}) is None
