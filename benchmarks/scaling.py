"""How time and kept memory of a step grow with rank, depth, length and number of processes."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders import build
from benchmarks.measure import Stepper, saved_bytes
from benchmarks.workloads import WORKLOADS, Workload, llama_of_depth

COLOURS = {"bound": "#999999", "peft lora": "#dd8452", "lora": "#4c72b0"}
NAMES = tuple(COLOURS)
SIZES: dict[str, tuple[int, ...]] = {
    "rank": (2, 8, 32, 128),
    "layers": (1, 2, 4, 8),
    "tokens in a row": (64, 128, 256, 512),
    "processes": (1, 2),
}
"""What is varied, and its values; the rest stays as in the workload `llama`."""

_VARIANTS: dict[str, Callable[[Workload, int], Workload]] = {
    "rank": lambda base, value: dataclasses.replace(base, r=value),
    "layers": lambda base, value: dataclasses.replace(base, build=llama_of_depth(value)),
    "tokens in a row": lambda base, value: dataclasses.replace(base, length=value),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement.

    Args:
        axis: What is varied.
        value: Its value.
        contender: Who is measured.
        seconds: Of a step: CPU time of this process, or, over processes, elapsed time.
        saved_bytes: What the forward pass keeps for backward.
    """

    axis: str
    value: int
    contender: str
    seconds: float
    saved_bytes: int


def measure_all(rounds: int) -> list[Point]:
    """Measure every contender at every size, on the CPU with one thread a process."""
    points = []
    for axis, values in SIZES.items():
        for value in values:
            measure = _over_processes if axis == "processes" else _alone
            points += measure(axis, value, rounds)
    return points


def _alone(axis: str, value: int, rounds: int) -> list[Point]:
    workload = _VARIANTS[axis](WORKLOADS["llama"], value)
    batch = workload.batch(torch.device("cpu"))
    contenders = {name: build(name, workload, lambda model: model) for name in NAMES}
    steppers = {name: Stepper(contender, batch) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for index in range(rounds + 1):
        for name, stepper in steppers.items():
            taken = stepper.timed()
            if index:
                seconds[name].append(taken)
    return [
        Point(
            axis=axis,
            value=value,
            contender=name,
            seconds=statistics.median(seconds[name]),
            saved_bytes=saved_bytes(contenders[name], batch),
        )
        for name in NAMES
    ]


def _over_processes(axis: str, value: int, rounds: int) -> list[Point]:
    """Time DDP steps with a batch for each process; the bound trains nothing, so there is nothing to synchronize."""
    points = []
    for name in NAMES[1:]:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(  # type: ignore[attr-defined, no-untyped-call]  # torch re-exports it untyped
            _rank, args=(value, name, rounds, results), nprocs=value
        )
        seconds, kept = results.get()
        points.append(Point(axis=axis, value=value, contender=name, seconds=seconds, saved_bytes=kept))
    return points


def _rank(rank: int, world_size: int, name: str, rounds: int, results: Any) -> None:  # noqa: ANN401 - a queue
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    workload = WORKLOADS["llama"]
    batch = workload.batch(torch.device("cpu"))
    contender = build(name, workload, lambda model: model)
    kept = saved_bytes(contender, batch)
    parallel = DistributedDataParallel(contender.model)
    contender = dataclasses.replace(contender, model=parallel, loss=lambda batch: workload.loss(parallel, batch))
    stepper, seconds = Stepper(contender, batch), []
    for index in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        stepper.step()
        if index:
            seconds.append(time.perf_counter() - start)
    if rank == 0:
        results.put((statistics.median(seconds), kept))
    dist.destroy_process_group()


def draw(path: Path, points: Sequence[Point]) -> None:
    """Draw time and kept memory against each size."""
    from matplotlib.figure import Figure

    axes_names = list(SIZES)
    figure = Figure(figsize=(3.4 * len(axes_names), 6), layout="constrained")
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    for column, axis_name in enumerate(axes_names):
        for row, (label, unit) in enumerate((("seconds a step", 1.0), ("kept for backward, MiB", float(1 << 20)))):
            axis = grid[row][column]
            for name in NAMES:
                own = [point for point in points if point.axis == axis_name and point.contender == name]
                values = [(point.seconds if row == 0 else point.saved_bytes) / unit for point in own]
                if own:
                    axis.plot([point.value for point in own], values, marker="o", label=name, color=COLOURS[name])
            axis.set_xscale("log", base=2)
            axis.set_xticks(SIZES[axis_name], [str(value) for value in SIZES[axis_name]])
            axis.set_ylim(bottom=0)
            axis.set_xlabel(axis_name)
            if column == 0:
                axis.set_ylabel(label)
            axis.tick_params(labelsize=8)
    grid[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
