"""A loss or gradient that is not finite never reaches the weights, and is never among the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lora_lightning.adapters import adapter_state_dict, iter_roles
from lora_lightning.callbacks import AdapterCheckpoint, NonFiniteGuard
from lora_lightning.errors import ConfigError, TrainingError
from lora_lightning.optim import Optim
from lora_lightning.tasks import StepOutput
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineData, LineTask, fit

pytestmark = LIGHTNING_WARNINGS
BAD_STEP = 4


class BadRow(LineData):
    """The fourth batch holds one value that is not finite."""

    def __init__(self, value: float = math.nan, seed: int = 1) -> None:
        super().__init__()
        self.value, self.seed = value, seed

    def samples(self, seed: int) -> list[dict[str, Tensor]]:
        rows = super().samples(seed)
        if seed == self.seed:
            rows[4 * (BAD_STEP - 1) + 1]["x"][3] = self.value
        return rows


class BadGradient(L.Callback):
    """Puts an infinite number into one gradient of the fourth step, behind the back of the loss."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: LineTask) -> None:
        if trainer.global_step == BAD_STEP - 1:
            parameter = {name: p for name, p, _ in iter_roles(pl_module.adapted)}["0.lora_B"]
            assert parameter.grad is not None
            parameter.grad[5, 1] = -math.inf


def steady() -> LineTask:
    """Return a task whose learning rate does not depend on how long the run is meant to be."""
    return LineTask(optim=Optim(lr=0.02, schedule="constant"))


def weights(task: LineTask) -> list[Any]:
    return [tensor.tolist() for tensor in adapter_state_dict(task.adapted).values()]


def weights_after(folder: Path, steps: int) -> list[Any]:
    task = steady()
    fit(folder / f"{steps}-steps", task=task, max_steps=steps)
    return weights(task)


@pytest.mark.parametrize(
    ("data", "extra", "words"),
    [
        (BadRow(), [], ["the loss is nan and the gradients of 2 of 2 parameters are not ('0.lora_A', '0.lora_B')"]),
        (LineData(), [BadGradient()], ["the loss is finite, but the gradients of 1 of 2 parameters", "('0.lora_B')"]),
    ],
    ids=["loss", "gradient"],
)
def test_it_stops_before_the_update(tmp_path: Path, data: LineData, extra: list[L.Callback], words: list[str]) -> None:
    task, saver = steady(), AdapterCheckpoint(every_n_train_steps=2)
    with pytest.raises(TrainingError) as error:
        fit(tmp_path, *extra, NonFiniteGuard(), saver, task=task, data=data)
    text = str(error.value)
    for word in [
        *words,
        "before optimizer step 4:",
        "learning rate 0.02",
        "epoch 0, batch 3",
        "Lower",
        saver.last_model_path,
    ]:
        assert word in text
    assert weights(task) == weights_after(tmp_path, BAD_STEP - 1)
    assert weights(task) != weights_after(tmp_path, BAD_STEP)  # the control: one more step would show
    assert torch.load(saver.last_model_path, weights_only=True)["global_step"] == 2

    unguarded = steady()
    fit(tmp_path / "unguarded", *extra, task=unguarded, data=data, max_steps=BAD_STEP)
    assert not all(torch.isfinite(tensor).all() for tensor in adapter_state_dict(unguarded.adapted).values())


def test_the_first_step_points_at_the_data_and_accumulated_batches_count(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"before optimizer step 1: .* No step was taken before it.* batch 4\)"):
        fit(tmp_path, NonFiniteGuard(), data=BadRow(), accumulate_grad_batches=5)


class ScaledTask(LineTask):
    """Runs in float32 whatever autocast says, so that only the scaler matters; its loss is large."""

    def compute_loss(self, batch: dict[str, Tensor]) -> StepOutput:
        with torch.autocast("cpu", enabled=False):
            return StepOutput(64 * super().compute_loss(batch).loss)


def scaled(folder: Path, guard: NonFiniteGuard, data: LineData | None = None) -> LineTask:
    """Train under a gradient scaler whose first scale is too large, so that several steps in a row are left out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    task, precision = ScaledTask(), MixedPrecision("16-mixed", "cpu", scaler)
    fit(folder / str(guard.max_skipped_steps), guard, task=task, data=data, plugins=[precision])
    assert 2.0**110 < scaler.get_scale() < 2.0**125
    return task


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_steps_that_a_gradient_scaler_leaves_out_are_no_reason_to_stop(tmp_path: Path) -> None:
    task = scaled(tmp_path, NonFiniteGuard())
    assert all(torch.isfinite(tensor).all() for tensor in adapter_state_dict(task.adapted).values())
    with pytest.raises(TrainingError, match=r"left out by the gradient scaler in a row.*bf16-mixed"):
        scaled(tmp_path, NonFiniteGuard(max_skipped_steps=1))
    with pytest.raises(TrainingError, match="the loss is nan"):
        scaled(tmp_path / "nan", NonFiniteGuard(), BadRow())
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        NonFiniteGuard(max_skipped_steps=-1)


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path: Path) -> None:
    saver = AdapterCheckpoint(monitor="val/loss")
    with pytest.raises(TrainingError, match=r"after optimizer step 6: val/loss is nan\. No checkpoint had been saved"):
        fit(tmp_path, NonFiniteGuard(), saver, data=BadRow(seed=2))
    assert not list(tmp_path.rglob("*.ckpt"))
    fit(tmp_path / "control", NonFiniteGuard(), saver := AdapterCheckpoint(monitor="val/loss"))
    assert saver.best_model_path


class Score(L.Callback):
    """Logs a made-up score at the end of each validation."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log("score", self.scores.pop(0))


@pytest.mark.filterwarnings("ignore:score is .* not among the best")
@pytest.mark.parametrize(
    ("scores", "mode", "best"),
    [
        ((math.nan, 0.5), "min", "epoch=1"),
        ((0.5, math.nan), "max", "epoch=0"),
        ((0.5, math.inf), "max", "epoch=0"),
        ((0.5, 0.9), "max", "epoch=1"),  # the control: a better finite value does take its place
        ((math.nan, math.nan), "max", ""),
    ],
)
def test_nan_is_never_the_best(tmp_path: Path, scores: tuple[float, ...], mode: str, best: str) -> None:
    saver = AdapterCheckpoint(monitor="score", mode=mode, filename="{epoch}")
    fit(tmp_path, Score(*scores), saver)
    assert Path(saver.best_model_path).stem == best
    assert torch.load(saver.last_model_path, weights_only=True)["global_step"] == 12


def test_the_refused_value_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="score is nan at step 6, so this step is not among the best"):
        fit(tmp_path, Score(math.nan), AdapterCheckpoint(monitor="score"), max_epochs=1)
