"""The bar reads metrics ten times a second at most, and always at the end of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lora_lightning.callbacks import PacedProgressBar, paced_progress_bar
from lora_lightning.tasks.log_pace import SECONDS_BETWEEN_VALUES
from tests.callbacks.runs import LIGHTNING_WARNINGS, fit
from tests.clock import Clock

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which the metrics are read while training."""
    steps: list[int] = []

    def read(bar: L.pytorch.callbacks.RichProgressBar, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        if trainer.training:
            steps.append(trainer.global_step)
        return original(bar, trainer, module)

    original = L.pytorch.callbacks.RichProgressBar.get_metrics
    monkeypatch.setattr(L.pytorch.callbacks.RichProgressBar, "get_metrics", read)
    return steps


@pytest.mark.parametrize(
    ("tick", "expected"),
    [(0.0, {1, 6, 12}), (2 * SECONDS_BETWEEN_VALUES, {*range(1, 13)})],
    ids=["fast", "slow"],
)
def test_how_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads, tick, expected) -> None:
    monkeypatch.setattr(paced_progress_bar, "time", Clock(tick))
    bar = PacedProgressBar(refresh_rate=1)
    trainer = fit(tmp_path, bar, enable_progress_bar=True)
    assert {*reads} == expected
    assert bar.get_metrics(trainer, trainer.lightning_module)["train/loss"] == pytest.approx(
        trainer.callback_metrics["train/loss"].item(), abs=1e-3
    )
