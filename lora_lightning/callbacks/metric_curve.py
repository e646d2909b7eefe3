"""A plot of loss and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor

from lora_lightning.callbacks.places import is_trial, passed_interval, run_folder
from lora_lightning.checkpoint.files import write_atomically
from lora_lightning.keywords import NamesNearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MetricCurve"]

Curve = list[list[float]]
"""Points `[optimizer step, value]` of one metric."""

MAX_MARKERS = 30
"""Longer curves are drawn without markers."""

NOT_METRICS = ("samples_per_second", "tokens_per_second", "epoch", "step", "lr")


class MetricCurve(NamesNearest, L.Callback):
    """Draw every logged loss and metric over the optimizer steps, when `fit` ends or is stopped.

    Each metric gets a panel with one line for each stage (`train`, `val`), in `<run folder>/curve.png`.
    Training metrics are read at the trainer's `log_every_n_steps`, validation metrics after each validation.

    Args:
        filename: Name of the image file in the run's folder.
    """

    def __init__(self, filename: str = "curve.png") -> None:
        self.filename = filename
        self.curves: dict[str, Curve] = {}
        self._path: Path | None = None
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the path of the plot; all ranks take part, which they could not do after a failure."""
        del pl_module
        self._path = run_folder(trainer) / self.filename

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step from which training continues."""
        del pl_module
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Read the training metrics at the log interval."""
        del pl_module, outputs, batch, batch_idx
        is_due = passed_interval(trainer, self._last_step)
        self._last_step = trainer.global_step
        if trainer.is_global_zero and is_due:
            self._read(trainer, "train")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the validation metrics."""
        del pl_module
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._read(trainer, "val")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the plot."""
        del pl_module
        self._draw(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Draw the points so far when training is stopped or fails."""
        del pl_module, exception
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the points so far, so that a resumed run draws the whole curve."""
        return {"curves": {name: [list(point) for point in curve] for name, curve in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the points."""
        self.curves = {name: [list(point) for point in curve] for name, curve in state_dict["curves"].items()}

    def _draw(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and self._path is not None and self.curves and not is_trial(trainer):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, draw(self.curves))

    def _read(self, trainer: L.Trainer, stage: str) -> None:
        step = float(trainer.global_step)
        for name, value in trainer.callback_metrics.items():
            if not name.startswith(f"{stage}/") or name.endswith(NOT_METRICS) or name.endswith("_epoch"):
                continue
            number = float(value.item() if isinstance(value, Tensor) else value)
            curve = self.curves.setdefault(name.removesuffix("_step"), [])
            if curve and curve[-1][0] == step:
                curve[-1][1] = number
            else:
                curve.append([step, number])


def draw(curves: dict[str, Curve]) -> bytes:
    """Draw curves as a PNG, one panel for each metric, the stages of a metric in one panel.

    Args:
        curves: Points by metric name, such as `train/loss`.

    Returns:
        The bytes of the picture.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = group_by_metric(curves)
    figure = Figure(figsize=(6.4, 3.2 * len(panels)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # draws without a screen, whatever backend is configured
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    stages = sorted({stage for lines in panels.values() for stage in lines})
    colors = {stage: f"C{index}" for index, stage in enumerate(stages)}  # a stage keeps its color in all panels
    for axis, (metric, lines) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, metric, lines, colors)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def group_by_metric(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Sort curves into panels: metric -> stage -> points, losses first.

    Example:
        >>> group_by_metric({"val/f1": [], "train/loss": [], "val/loss": []})
        {'loss': {'train': [], 'val': []}, 'f1': {'val': []}}
    """
    panels: dict[str, dict[str, Curve]] = {}
    for name in sorted(curves, key=lambda name: ("loss" not in name, name)):
        stage, _, metric = name.rpartition("/")
        panels.setdefault(metric, {})[stage or metric] = curves[name]
    return panels


def _draw_panel(axis: Axes, metric: str, lines: dict[str, Curve], colors: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for stage, curve in lines.items():
        steps, values = [point[0] for point in curve], [point[1] for point in curve]
        marker = "o" if len(curve) <= MAX_MARKERS else None
        axis.plot(steps, values, label=stage, color=colors[stage], linewidth=1.5, marker=marker, markersize=3)
    axis.set_title(metric.replace("_", " "), loc="left")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(metric.replace("_", " "))
    axis.tick_params(labelbottom=True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(visible=True, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
