"""The figures as a Markdown table, a CSV and a chart."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Counts, Timing, quartiles

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Line:
    """One contender on one workload.

    Args:
        workload: Name of the workload.
        contender: Name of the contender.
        counts: What depends on no clock.
        bound: The same of the bound.
        timing: Times, or None in a quick run.
    """

    workload: str
    contender: str
    counts: Counts
    bound: Counts
    timing: Timing | None = None

    @property
    def saved_ratio(self) -> float:
        """Bytes kept for backward, over the bound's."""
        return self.counts.saved_bytes / self.bound.saved_bytes


def markdown(title: str, lines: Sequence[Line]) -> str:
    """Return a table of the lines of one workload."""
    head = (
        "| "
        + title
        + " | time / bound (quartiles) | time / PEFT (quartiles) | kept, MiB | / bound | peak, MiB | GFLOP |"
    )
    rows = [head, "|" + "---|" * 7]
    for line in lines:
        to_bound = to_peer = ""
        if line.timing is not None:
            to_bound, to_peer = _ratio(line.timing.to_bound), _ratio(line.timing.to_peer)
        counts = line.counts
        rows.append(
            f"| {line.contender} | {to_bound} | {to_peer} | {counts.saved_bytes / _MIB:.1f} | {line.saved_ratio:.2f} | "
            f"{counts.peak_bytes / _MIB:.0f} | {counts.flops / 1e9:.1f} |"
        )
    return "\n".join(rows) + "\n"


def _ratio(values: tuple[float, ...]) -> str:
    if len(values) < 2:
        return ""
    first, median, third = quartiles(values)
    return f"{median:.2f} ({first:.2f} to {third:.2f})"


def write_csv(path: Path, lines: Sequence[Line]) -> None:
    """Write every figure, one row a contender."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        names = ["q1", "median", "q3"]
        columns = ["workload", "contender", "trained", "saved_bytes", "peak_bytes", "flops", "seconds"]
        writer.writerow([*columns, *(f"to_bound_{n}" for n in names), *(f"to_peft_{n}" for n in names)])
        for line in lines:
            counts, timing = line.counts, line.timing
            fixed = [line.workload, line.contender, counts.trained, counts.saved_bytes, counts.peak_bytes, counts.flops]
            times: list[object] = [""] * 7
            if timing is not None:
                to_peer = quartiles(timing.to_peer) if timing.to_peer else ("", "", "")
                times = [quartiles(timing.seconds)[1], *quartiles(timing.to_bound), *to_peer]
            writer.writerow([*fixed, *times])


def draw(path: Path, titles: Mapping[str, str], lines: Sequence[Line]) -> None:
    """Draw time and kept bytes of each contender, over the bound's, one row of charts a workload."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(line.workload for line in lines))
    figure = Figure(figsize=(11, 3.4 * len(workloads)), layout="constrained")
    axes = figure.subplots(len(workloads), 2, squeeze=False)
    for row, workload in zip(axes, workloads, strict=True):
        own = [line for line in lines if line.workload == workload]
        names = [line.contender for line in own]
        times = [quartiles(line.timing.to_bound)[1] if line.timing else 0.0 for line in own]
        for axis, values, label in zip(
            row, (times, [line.saved_ratio for line in own]), ("time", "kept bytes"), strict=True
        ):
            colours = ["#999999" if name.startswith(("peft", "full", "bound")) else "#4c72b0" for name in names]
            axis.barh(names[::-1], values[::-1], color=colours[::-1])
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_title(f"{titles[workload]}: {label} / bound", fontsize=9)
            axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)
