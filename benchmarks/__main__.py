"""Run the benchmark: `scripts/benchmark`, `scripts/benchmark --quick`, `scripts/benchmark --device cuda`."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import scaling
from benchmarks.contenders import CONTENDERS, COUNTERPARTS, PAIRS, Contender, build
from benchmarks.equality import check_equal
from benchmarks.measure import Counts, Stepper, count, time_all
from benchmarks.precision import prepare
from benchmarks.report import Line, draw, markdown, write_csv
from benchmarks.workloads import WORKLOADS, Workload

BASELINE = Path(__file__).with_name("baseline.json")
QUICK_CONTENDERS = ("bound", "lora", "lora, lean", "lora, dropout 0.1", "dora", "dora, lean")
TOLERANCE = 0.02
"""How much a counted figure may exceed the committed one, as a share."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; return 1 where a quick run costs more than the committed baseline."""
    options = _parse(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]
    warnings.filterwarnings("ignore")  # PEFT's and transformers' hints about their own use
    transformers.utils.logging.disable_progress_bar()
    chosen = QUICK_CONTENDERS if options.quick and options.contenders is None else options.contenders or [*CONTENDERS]
    make = functools.partial(prepare, device=device, dtype=dtype, four_bit=options.nf4)
    if options.scaling:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        scaling.draw(options.output_dir / "scaling.png", scaling.measure_all(options.rounds))
        return 0
    lines: list[Line] = []
    for name in options.workloads:
        workload = WORKLOADS[name]
        if not options.quick:
            for ours, theirs in PAIRS.items():
                if ours in chosen and theirs in chosen:
                    gap = _compare(workload, ours, theirs, make, device, dtype)
                    print(f"{name}: {ours} equals {theirs} to {gap:.1e}", file=sys.stderr, flush=True)
        lines += _measure(workload, chosen, make, device, options)
        print(markdown(workload.title, [line for line in lines if line.workload == name]), flush=True)
    _write(lines, options.output_dir)
    return _against_baseline(lines, options) if options.quick else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS], default=["minilm", "llama"])
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS], help="all where left out; bound is always in")
    parser.add_argument("--device", default="cpu", help="cpu (one thread, CPU time) or cuda (device time)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="precision of the base")
    parser.add_argument("--nf4", action="store_true", help="store the base in 4 bits")
    parser.add_argument("--compile", action="store_true", help="compile every model")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block in backward")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count, at least 2")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="only what depends on no clock, against the baseline")
    parser.add_argument(
        "--scaling", action="store_true", help="instead: draw cost against rank, depth, length, processes"
    )
    parser.add_argument(
        "--write-baseline", action="store_true", help="with --quick: keep these figures as the baseline"
    )
    return parser.parse_args(arguments)


def _compare(
    workload: Workload,
    ours: str,
    theirs: str,
    make: functools.partial[nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    pair = build(ours, workload, make), build(theirs, workload, make)
    return check_equal(*pair, workload.batch(device), dtype)


def _measure(
    workload: Workload,
    chosen: Sequence[str],
    make: functools.partial[nn.Module],
    device: torch.device,
    options: argparse.Namespace,
) -> list[Line]:
    """Count each contender by itself, then time all in turn."""
    batch = workload.batch(device)
    names = list(dict.fromkeys(["bound", *chosen]))
    counts: dict[str, Counts] = {}
    for name in names:
        counts[name] = count(Stepper(_ready(name, workload, make, options), batch))
        gc.collect()
    timings = {}
    if not options.quick:
        steppers = {name: Stepper(_ready(name, workload, make, options), batch) for name in names}
        timings = time_all(steppers, COUNTERPARTS, rounds=options.rounds, warm_up=options.warm_up)
    return [
        Line(workload=workload.name, contender=n, counts=counts[n], bound=counts["bound"], timing=timings.get(n))
        for n in names
    ]


def _ready(name: str, workload: Workload, make: functools.partial[nn.Module], options: argparse.Namespace) -> Contender:
    contender = build(name, workload, make)
    if options.checkpointing:
        model: Any = getattr(contender.model, "base_model", contender.model)  # PEFT's wrappers, where there are any
        getattr(model, "model", model).gradient_checkpointing_enable()
    if options.compile:
        contender.model.compile()
    return contender


def _write(lines: Sequence[Line], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    titles = {name: workload.title for name, workload in WORKLOADS.items()}
    tables = [
        markdown(titles[name], [line for line in lines if line.workload == name])
        for name in dict.fromkeys(line.workload for line in lines)
    ]
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    (folder / "benchmark.md").write_text("\n".join(tables) + f"\n{where}\n")
    write_csv(folder / "benchmark.csv", lines)
    if any(line.timing is not None for line in lines):
        draw(folder / "benchmark.png", titles, lines)
    print(f"Written to {folder}: benchmark.md, benchmark.csv", file=sys.stderr)


def _against_baseline(lines: Sequence[Line], options: argparse.Namespace) -> int:
    figures = {f"{line.workload}: {line.contender}": asdict(line.counts) for line in lines}
    if options.write_baseline:
        BASELINE.write_text(json.dumps(figures, indent=2) + "\n")
        return 0
    baseline = json.loads(BASELINE.read_text())
    worse = [
        f"{name}: {key} is {value:,}, {value / baseline[name][key] - 1:+.1%} against the baseline"
        for name, own in figures.items()
        for key, value in own.items()
        if name in baseline and value > baseline[name][key] * (1 + TOLERANCE)
    ]
    missing = [f"{name} is not in the baseline" for name in figures if name not in baseline]
    for line in [*worse, *missing]:
        print(line, file=sys.stderr)
    if not worse and not missing:
        print(f"All counted figures are within {TOLERANCE:.0%} of the baseline.", file=sys.stderr)
    return 1 if worse or missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
