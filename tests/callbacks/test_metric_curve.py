"""The picture shows what was logged, at the steps where it was logged, also after a resume or a failure."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from lora_lightning.callbacks import AdapterCheckpoint, MetricCurve, Throughput, metric_curve
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineData, LineTask, fit, make_trainer

pytestmark = LIGHTNING_WARNINGS


def test_points_are_what_was_logged(tmp_path: Path) -> None:
    callback = MetricCurve()
    trainer = fit(tmp_path, callback, Throughput())
    assert set(callback.curves) == {"train/loss", "val/loss", "val/accuracy"}
    assert [step for step, _ in callback.curves["train/loss"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in callback.curves["val/loss"]] == [6, 12]
    rows = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    logged = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert [value for _, value in callback.curves["train/loss"]] == pytest.approx(logged)
    assert callback.curves["val/loss"][-1][1] == pytest.approx(float(trainer.callback_metrics["val/loss"]))


def test_picture_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    fit(tmp_path, MetricCurve("picture.png"))
    picture = image.imread(tmp_path / "run" / "version_0" / "picture.png")
    assert picture.shape[0] > 600
    assert picture.std() > 0.01
    loss, accuracy = figures[0].axes
    assert [axis.get_title(loc="left") for axis in (loss, accuracy)] == ["loss", "accuracy"]
    assert {axis.get_xlabel() for axis in (loss, accuracy)} == {"optimizer step"}
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "val"]
    assert loss.get_lines()[1].get_color() == accuracy.get_lines()[0].get_color()


class Fail(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("stop")


def test_a_failed_run_has_a_picture_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, MetricCurve(), Fail())
    assert (tmp_path / "run" / "version_0" / "curve.png").stat().st_size > 1000


def test_a_resumed_run_draws_the_whole_curve(tmp_path: Path) -> None:
    fit(tmp_path, AdapterCheckpoint(dirpath=tmp_path / "c"), MetricCurve(), max_epochs=1)
    callback = MetricCurve()
    trainer = make_trainer(tmp_path, callback, AdapterCheckpoint(dirpath=tmp_path / "other"), logger=False)
    with pytest.warns(UserWarning, match="dirpath has changed"):
        trainer.fit(LineTask(), LineData(), ckpt_path=tmp_path / "c" / "last.ckpt", weights_only=True)
    assert [step for step, _ in callback.curves["train/loss"]] == [2, 4, 6, 8, 10, 12]


def test_nothing_logged_and_trial_runs_leave_no_picture(tmp_path: Path) -> None:
    fit(tmp_path, MetricCurve(), fast_dev_run=True)
    callback = MetricCurve()
    fit(tmp_path, callback, max_steps=1, limit_val_batches=0, log_every_n_steps=50)
    assert callback.curves == {}
    assert not list(tmp_path.rglob("*.png"))


def test_nan_and_single_points_can_be_drawn() -> None:
    curves = {"train/loss": [[1.0, float("nan")], [2.0, 1.0]], "val/loss": [[2.0, 1.0]], "lonely": [[1.0, 2.0]]}
    assert metric_curve.draw(curves).startswith(b"\x89PNG")


def test_panels_put_losses_first() -> None:
    curves = {name: [] for name in ("val/f1", "val/accuracy", "train/loss", "val/loss")}
    panels = metric_curve.group_by_metric(curves)
    assert {metric: list(stages) for metric, stages in panels.items()} == {
        "loss": ["train", "val"],
        "accuracy": ["val"],
        "f1": ["val"],
    }
    assert next(iter(panels)) == "loss"
