"""Validation and test of a task: its metrics, and the hooks of Lightning that update and log them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lora_lightning.checks.monitors import Direction
from lora_lightning.tasks.checkpoint_state import CheckpointState
from lora_lightning.tasks.evaluation import EvaluationSets, Measures, measured, sets_of
from lora_lightning.tasks.step_output import StepOutput, batch_size_of, require_output

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from lora_lightning.tasks.tables import Table, TableMetric

T = TypeVar("T")


class EvaluatedTask(CheckpointState, abc.ABC):
    """The part of `AdapterTask` that measures loss, metrics and tables of validation and test.

    Attributes:
        evaluation_table: Table of the last evaluation, over all its sets; None if the task has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._measures_of: dict[str, Measures] = {}
        self.evaluation_table: Table | None = None

    @abc.abstractmethod
    def compute_loss(self, batch: Any) -> StepOutput:  # noqa: ANN401 - the data module's own type
        """Return the loss of a batch, and what the metrics need."""

    @abc.abstractmethod
    def _checked(self, stage: str, compute: Callable[[Any], T], batch: Any) -> T:  # noqa: ANN401 - the data module's own type
        """Call `compute` on a batch; on the first batch of a stage, check that every adapter is called."""

    def configure_metrics(self) -> MetricCollection | None:
        """Return the metrics of validation and test, or None."""
        return None

    def configure_table(self) -> TableMetric | None:
        """Return a table of validation and test for the run's report, or None."""
        return None

    # What Lightning calls.

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401 - the data module's own type
        """Measure a batch of validation."""
        del batch_idx
        self._evaluate(batch, sets_of(self._trainer, "val"), dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401 - the data module's own type
        """Measure a batch of the test."""
        del batch_idx
        self._evaluate(batch, sets_of(self._trainer, "test"), dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Start measuring."""
        self._start_evaluation(sets_of(self._trainer, "val"))

    def on_test_epoch_start(self) -> None:
        """Start measuring."""
        self._start_evaluation(sets_of(self._trainer, "test"))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of validation."""
        self._end_evaluation(sets_of(self._trainer, "val"))

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test."""
        self._end_evaluation(sets_of(self._trainer, "test"))

    # Helpers.

    def _start_evaluation(self, sets: EvaluationSets) -> None:
        """Prepare for the first batch of an evaluation."""

    def _evaluate(self, batch: Any, sets: EvaluationSets, index: int) -> None:  # noqa: ANN401 - the data module's own type
        """Update the metrics of a batch's set, by the index of its loader, and those of all sets together."""
        output = self._checked(sets.stage, self.compute_loss, batch)
        require_output(output, type(self).__name__, trains=False)
        for prefix in sets.prefixes_of(index):
            self._measures(prefix).update(output, batch_size_of(batch))
        if not sets.names:
            self._log_measures(sets)  # while batches pass, so that every hook at the end of the epoch finds it

    def _end_evaluation(self, sets: EvaluationSets) -> None:
        """Log after the last batch; metrics of all sets together cannot be logged in the step of one loader."""
        if sets.names:
            self._log_measures(sets)
        self.evaluation_table = self._measures(sets.stage).take_table()

    def _log_measures(self, sets: EvaluationSets) -> None:
        for prefix in sets.prefixes:
            for name, metric in self._measures(prefix).named():
                self.log(f"{prefix}/{name}", metric, prog_bar=sets.is_all(prefix), metric_attribute=prefix)

    def _measured(self) -> dict[str, Direction | None]:
        """Return the metrics of each set, by name."""
        return measured(self.configure_metrics())

    def _measures(self, prefix: str) -> Measures:
        """Return the metrics under a prefix; the names of sets are known only when there are loaders."""
        if prefix not in self._measures_of:
            self._add_measures(prefix, f"set_metrics_{len(self._measures_of)}")
        return self._measures_of[prefix]

    def _add_measures(self, prefix: str, attribute: str) -> None:
        metrics = self.configure_metrics()
        table = self.configure_table() if prefix in ("val", "test") else None
        measures = Measures(None if metrics is None else metrics.clone(), table).to(self.device)
        self._measures_of[prefix] = measures
        self.add_module(attribute, measures)
