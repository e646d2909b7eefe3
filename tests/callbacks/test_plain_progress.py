"""Lines at the logging interval, and at least one a minute when steps are slow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_lightning.callbacks import PlainProgress, Throughput, plain_progress
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineData, LineTask, fit, make_trainer
from tests.clock import Clock

pytestmark = LIGHTNING_WARNINGS


def steps(out: str) -> list[int]:
    return [int(step) for step in re.findall(r"step (\d+)/12  train/loss", out)]


@pytest.mark.parametrize(
    ("tick", "expected"), [(0.0, [2, 4, 6, 8, 10, 12]), (61.0, [*range(1, 13)])], ids=["fast", "slow"]
)
def test_how_often(tmp_path: Path, monkeypatch, capsys, tick, expected) -> None:
    monkeypatch.setattr(plain_progress, "time", Clock(tick))
    fit(tmp_path, Throughput(), PlainProgress(), enable_progress_bar=True)
    out = capsys.readouterr().out
    assert steps(out) == expected
    assert out.count("val/accuracy") == 2
    assert ("validation: batch" in out) == (tick > 60)


def test_batches_between_optimizer_steps_count_as_time(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(plain_progress, "time", Clock(61.0))
    fit(tmp_path, PlainProgress(), enable_progress_bar=True, accumulate_grad_batches=3, max_epochs=1)
    out = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"step (\d)/2  ", out)][:6] == [0, 0, 1, 1, 1, 2]


def test_time_left_is_that_of_the_steps_so_far(tmp_path: Path, monkeypatch, capsys) -> None:
    clock = Clock()
    monkeypatch.setattr(plain_progress, "time", clock)

    class TenSecondsAStep(PlainProgress):
        def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
            clock.now += 10
            super().on_train_batch_end(*args, **kwargs)

    fit(tmp_path, TenSecondsAStep(), enable_progress_bar=True)
    seconds = [100, 80, 60, 40, 20, 0]  # before the last of 12 steps
    expected = [f"0:{second // 60:02}:{second % 60:02}" for second in seconds]
    assert re.findall(r"(\S+) left", capsys.readouterr().out) == expected


class Predicting(LineTask):
    def predict(self, batch):
        return self.adapted(batch["x"])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_slow_evaluations_say_how_far_they_are(tmp_path: Path, monkeypatch, capsys, stage) -> None:
    monkeypatch.setattr(plain_progress, "time", Clock(61.0))
    trainer = make_trainer(tmp_path, PlainProgress(), enable_progress_bar=True)
    getattr(trainer, stage)(
        Predicting(), LineData().val_dataloader(), **({} if stage == "predict" else {"verbose": False})
    )
    name = "validation" if stage == "validate" else stage
    assert re.findall(rf"{name}: batch (\d)/6", capsys.readouterr().out) == [*"123456"]
