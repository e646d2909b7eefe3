"""The training loss is logged where somebody reads it: loggers, monitors, the end of an epoch, and the eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping

from lora_lightning.tasks import log_pace
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineTask, fit
from tests.clock import Clock

pytestmark = LIGHTNING_WARNINGS
STEPS_PER_EPOCH = 6


class Noting(LineTask):
    """Notes at which steps it logs the loss of training, and every loss."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[int] = []
        self.losses: list[float] = []

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        if name == "train/loss":
            self.logged.append(self.trainer.fit_loop.total_batch_idx + 1)
        super().log(name, *args, **kwargs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        del batch, batch_idx
        self.losses.append(outputs["loss"].item())


def logged(folder: Path, monkeypatch: pytest.MonkeyPatch, *callbacks: L.Callback, tick: float = 0.0, **settings: Any):
    monkeypatch.setattr(log_pace, "time", Clock(tick))
    task = Noting()
    trainer = fit(folder, *callbacks, task=task, **{"log_every_n_steps": 4, **settings})
    return task, trainer


def test_first_last_and_what_loggers_take(tmp_path, monkeypatch):
    task, trainer = logged(tmp_path, monkeypatch)
    assert task.logged == [1, 4, 6, 8, 12]
    assert len(task.losses) == 2 * STEPS_PER_EPOCH
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(task.losses[-1])
    assert task.losses[-1] != pytest.approx(task.losses[-2])


def test_the_last_step_of_a_run_that_ends_amid_an_epoch(tmp_path, monkeypatch):
    task, trainer = logged(tmp_path, monkeypatch, max_steps=9)
    assert task.logged == [1, 4, 6, 8, 9]
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(task.losses[-1])


@pytest.mark.parametrize(("monitor", "is_read"), [("train/loss", True), ("val/loss", False)])
def test_a_monitor_of_training_sees_every_step(tmp_path, monkeypatch, monitor, is_read):
    task, _ = logged(tmp_path, monkeypatch, EarlyStopping(monitor, patience=9, check_on_train_epoch_end=False))
    assert (task.logged == [*range(1, 2 * STEPS_PER_EPOCH + 1)]) is is_read


def test_slow_steps_are_all_logged(tmp_path, monkeypatch):
    task, _ = logged(tmp_path, monkeypatch, tick=2 * log_pace.SECONDS_BETWEEN_VALUES)
    assert task.logged == [*range(1, 2 * STEPS_PER_EPOCH + 1)]
