"""A report of a run: curves, metrics, settings, confusion matrix, samples, merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L

from lora_lightning import page
from lora_lightning.callbacks.merge_at_end import MergeAtEnd
from lora_lightning.callbacks.metric_curve import MetricCurve, draw
from lora_lightning.callbacks.places import is_trial, run_folder
from lora_lightning.callbacks.sample_generations import SampleGenerations
from lora_lightning.checkpoint.files import write_atomically
from lora_lightning.keywords import NamesNearest
from lora_lightning.tasks.tables import Table

__all__ = ["RunReport"]

_CONFIG = "config.yaml"


class RunReport(NamesNearest, L.Callback):
    """Write one HTML page about a run, `<run folder>/report.html`, when `fit` ends or is stopped.

    It holds the curves (of `MetricCurve`), the last value of each metric, the confusion matrix or the table of entities
    of the last validation, the last sample outputs (of `SampleGenerations`), the merge report (of `MergeAtEnd`) and the
    settings. The page is self-contained.

    Args:
        filename: Name of the page inside the run's folder.
    """

    def __init__(self, filename: str = "report.html") -> None:
        self.filename = filename
        self._folder: Path | None = None
        self._metrics: dict[str, float] = {}
        self._table: Table | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder; all ranks take part, which they could not do after a failure."""
        del pl_module
        self._folder = run_folder(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the table and the metrics of the last validation."""
        if not trainer.sanity_checking:
            self._table = getattr(pl_module, "evaluation_table", None)
            self._keep_metrics(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the last metrics."""
        del pl_module
        self._keep_metrics(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the page."""
        self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the available sections when training is stopped or fails."""
        self._write(trainer, pl_module, f"ended by {type(exception).__name__}: {exception}".rstrip(": "))

    def _keep_metrics(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            self._metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, outcome: str) -> None:
        if self._folder is None or not trainer.is_global_zero or is_trial(trainer) or not self._folder.exists():
            return
        title = f"{type(pl_module).__name__}: {self._folder}"
        intro = f'<p class="soft">After step {trainer.global_step}, epoch {trainer.current_epoch}; {outcome}.</p>'
        parts = [intro, *self._parts(trainer, self._folder)]
        write_atomically(self._folder / self.filename, page.page(title, parts).encode())

    def _parts(self, trainer: L.Trainer, folder: Path) -> list[str]:
        """Return the sections for which the run has content."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
        parts = [self._metrics_part()]
        for callback in callbacks:
            if isinstance(callback, MetricCurve) and callback.curves:
                parts.append(page.section("Curves", page.picture("Metrics by optimizer step", draw(callback.curves))))
            if isinstance(callback, SampleGenerations):
                parts += _samples(folder / callback.filename)
            if isinstance(callback, MergeAtEnd) and callback.report is not None:
                lines = [f"Folder: {callback.merged_dir}", *callback.report.loss.lines()]
                parts.append(page.section("Merge", page.verbatim("\n".join(lines))))
        if self._table is not None:
            parts.insert(1, _table(self._table))
        if (folder / _CONFIG).is_file():
            parts.append(page.section("Settings", page.verbatim((folder / _CONFIG).read_text(encoding="utf-8"))))
        return parts

    def _metrics_part(self) -> str:
        rows = [(name, f"{value:.5g}") for name, value in sorted(self._metrics.items())]
        return page.section("Metrics", page.table(["metric", "last value"], rows))


def _table(table: Table) -> str:
    rows = [[name, *counts] for name, counts in zip(table.rows, table.counts, strict=True)]
    return page.section(f"Last validation: {table.title}", page.table(["", *table.columns], rows))


def _samples(path: Path) -> list[str]:
    """Return the section of the samples of the last step in a file of samples."""
    if not path.is_file():
        return []
    samples: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = samples[-1]["step"]
    names = ["prompt", "expected", "generated"]
    rows = [[sample[name] or "" for name in names] for sample in samples if sample["step"] == last]
    return [page.section(f"Samples after step {last}", page.table(names, rows, is_text=True))]
