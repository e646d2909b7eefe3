"""Charts of the comparison: a test metric against its cost, and the learning curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lightning.commands._compare.report.table import Row
from lora_lightning.commands._compare.runner import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP*X<>ph"
_DPI = 140
_REACHES = (8, 16, 26, 38, 52, 70)
"""Distances of a label from its point, in points; the nearest free position is used."""
_SMOOTHING = 0.1
"""Weight of each new training loss in the running mean that is drawn."""


@dataclass(frozen=True)
class Cost:
    """The horizontal axis of a chart.

    Args:
        name: Name of the file, without its suffix.
        key: Column of the table.
        title: Label of the axis.
        unit: One unit of the axis in the table's unit.
        is_log: Whether the axis is logarithmic.
    """

    name: str
    key: str
    title: str
    unit: float = 1.0
    is_log: bool = False


COSTS = (
    Cost("accuracy_by_parameters", "trainable", "trainable parameters beside the head", is_log=True),
    Cost("accuracy_by_memory", "peak_memory", "peak memory in training (MiB)", unit=1 << 20),
    Cost("accuracy_by_time", "train_seconds", "time of the training steps (s)"),
)


def main_metric(rows: Sequence[Row]) -> str | None:
    """Return the key of the test metric that the charts show: accuracy, else the first, else the loss."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values if key.startswith("test_")))
    keys.sort(key=lambda key: (key == "test_loss", key != "test_accuracy"))
    return keys[0] if keys else None


def draw_all(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> dict[str, bytes]:
    """Draw every chart for which there are figures.

    Returns:
        PNG images by the name of their file, without its suffix.
    """
    metric = main_metric(rows)
    if metric is None:
        return {}
    styles = _styles(rows)
    pictures = {cost.name: _scatter(rows, cost, metric, styles) for cost in COSTS}
    pictures["learning_curves"] = _curves(outcomes, styles)
    return pictures


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Assign a colour and a marker to each row, the same in every chart."""
    from matplotlib import colormaps

    palette = [colormaps["tab20"](index) for index in (*range(0, 20, 2), *range(1, 20, 2))]
    ends = {"frozen": "#777777", "full": "#000000"}
    styles = {}
    for index, row in enumerate(rows):
        colour = ends.get(row.kind, palette[index % len(palette)])
        styles[row.label] = {"color": colour, "marker": _MARKERS[index % len(_MARKERS)]}
    return styles


def _scatter(rows: Sequence[Row], cost: Cost, metric: str, styles: dict[str, dict[str, Any]]) -> bytes:
    """Draw a metric against a cost, each point with its name beside it."""
    figure = _figure(11, 8)
    axes = figure.subplots()
    points: list[tuple[str, float, float]] = []
    for row in rows:
        x, y = row.values.get(cost.key), row.values.get(metric)
        if not isinstance(x, int | float) or not isinstance(y, int | float):
            continue
        if cost.is_log and x <= 0:  # nothing but the head trains: a level to rise above, not a place on this axis
            axes.axhline(y, color=styles[row.label]["color"], linestyle="--", linewidth=1, label=row.label)
            continue
        where = float(x) / cost.unit
        spread = row.spreads.get(metric)
        axes.errorbar(
            where, y, yerr=spread, linestyle="none", markersize=7, label=row.label, capsize=3, **styles[row.label]
        )
        points.append((row.label, where, float(y)))
    if cost.is_log:
        axes.set_xscale("log")
    axes.margins(0.12)
    axes.set_xlabel(cost.title)
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _label(axes, points)
    return _png(figure)


def _label(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Label each point such that its name covers no point and no other name."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    pixels = [axes.transData.transform((x, y)) for _, x, y in points]
    scale = figure.dpi / 72
    taken = [(px - 6 * scale, py - 6 * scale, px + 6 * scale, py + 6 * scale) for px, py in pixels]
    frame = axes.get_window_extent(renderer)
    for label, x, y in points:
        best: tuple[float, tuple[int, int], Any, Any] | None = None
        text = axes.annotate(label, (x, y), fontsize=8, xytext=(0, 0), textcoords="offset points")
        for dx, dy, horizontal, vertical in _places():
            text.set_position((dx, dy))
            text.set_horizontalalignment(horizontal)
            text.set_verticalalignment(vertical)
            box = text.get_window_extent(renderer)
            own = (box.x0, box.y0, box.x1, box.y1)
            cover = sum(_overlap(own, other) for other in taken) + 10 * _outside(own, frame)
            if best is None or cover < best[0]:
                best = (cover, (dx, dy), horizontal, vertical)
            if cover == 0:
                break
        assert best is not None
        _, (dx, dy), horizontal, vertical = best
        text.remove()
        line = {"arrowstyle": "-", "color": "#666666", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2}
        text = axes.annotate(
            label,
            (x, y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            fontsize=8,
            arrowprops=line if max(abs(dx), abs(dy)) > _REACHES[0] else None,
        )
        box = text.get_window_extent(renderer)
        taken.append((box.x0, box.y0, box.x1, box.y1))


def _places() -> list[tuple[int, int, Any, Any]]:
    """Return the positions of a label around its point, the nearest first: offsets and alignments."""
    places = []
    for reach in _REACHES:
        slanted = round(0.75 * reach)
        places += [
            (reach, 0, "left", "center"),
            (-reach, 0, "right", "center"),
            (0, reach, "center", "bottom"),
            (0, -reach, "center", "top"),
            (slanted, slanted, "left", "bottom"),
            (slanted, -slanted, "left", "top"),
            (-slanted, slanted, "right", "bottom"),
            (-slanted, -slanted, "right", "top"),
        ]
    return places


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: tuple[float, ...], frame: Any) -> float:  # noqa: ANN401 - a matplotlib box
    inside = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return max((box[2] - box[0]) * (box[3] - box[1]) - inside - 1e-6, 0.0)


def _curves(outcomes: Sequence[Outcome], styles: dict[str, dict[str, Any]]) -> bytes:
    """Draw training losses, smoothed, and validation losses of the first seed's full runs."""
    figure = _figure(13, 6)
    left, right = figure.subplots(1, 2)
    for outcome in outcomes:
        result = next(iter(outcome.finals.values()), None)
        if result is None:
            continue
        style, label = styles[outcome.entry.label], outcome.entry.label
        dashes = "--" if outcome.entry.kind != "method" else "-"
        steps, losses = _smoothed(result["losses"])
        left.plot(steps, losses, color=style["color"], linestyle=dashes, linewidth=1.3)
        known = [(at["step"], at["loss"]) for at in result["validations"] if at.get("loss") is not None]
        right.plot(
            *zip(*known, strict=True), linestyle=dashes, markersize=4, linewidth=1.3, label=label, **style
        ) if known else None
    for axes, title in ((left, "training loss (running mean)"), (right, "validation loss")):
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _png(figure)


def _smoothed(losses: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float]]:
    """Return steps and a running mean of the losses.

    Example:
        >>> _smoothed([[1, 2.0], [2, None], [3, 2.0]])
        ([1.0, 3.0], [2.0, 2.0])
    """
    steps: list[float] = []
    means: list[float] = []
    for step, loss in losses:
        if loss is not None and step is not None:
            means.append(loss if not means else (1 - _SMOOTHING) * means[-1] + _SMOOTHING * loss)
            steps.append(float(step))
    return steps, means


def _figure(width: float, height: float) -> Any:  # noqa: ANN401 - matplotlib publishes no types
    """Return a figure that is drawn into memory, independent of the user's backend; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:  # noqa: ANN401 - matplotlib publishes no types
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()
