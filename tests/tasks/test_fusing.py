"""Optimizers are fused where the Trainer can step them, and clipping works everywhere."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest

from tests.callbacks.runs import LIGHTNING_WARNINGS, fit

pytestmark = LIGHTNING_WARNINGS


@pytest.mark.parametrize(("precision", "is_fused"), [("32-true", True), ("bf16-mixed", None)])
def test_clipping(tmp_path: Path, precision: str, is_fused: bool | None) -> None:
    trainer: L.Trainer = fit(tmp_path, precision=precision, gradient_clip_val=0.5, max_epochs=1)
    assert trainer.optimizers[0].defaults["fused"] is is_fused
    assert trainer.global_step == 6
