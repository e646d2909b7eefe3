"""The sets of rows of a validation or test, and the metrics of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lora_lightning.checks.monitors import Direction
from lora_lightning.tasks.step_output import StepOutput

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from lora_lightning.tasks.tables import Table, TableMetric

Stage = Literal["val", "test"]


@dataclass(frozen=True)
class EvaluationSets:
    """The sets of a stage. Each has separate metrics, logged under a prefix, and so have all of them together.

    Args:
        stage: The stage, which is also the prefix of all sets together.
        names: Name of each set, by the index of its loader; empty for a single set without a name.

    Example:
        >>> sets = EvaluationSets("val", ("reviews", "tweets"))
        >>> sets.prefixes
        ('val/reviews', 'val/tweets', 'val')
        >>> sets.prefixes_of(1), EvaluationSets("val").prefixes_of(0)
        (('val/tweets', 'val'), ('val',))
    """

    stage: Stage
    names: tuple[str, ...] = ()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of all metrics; that of all sets together is the last."""
        return (*(f"{self.stage}/{name}" for name in self.names), self.stage)

    def prefixes_of(self, index: int) -> tuple[str, ...]:
        """Return the prefixes of the metrics that the batches of a loader update."""
        if not self.names:
            return (self.stage,)
        return self.prefixes[index], self.stage

    def is_all(self, prefix: str) -> bool:
        """Return whether a prefix is that of all sets together."""
        return prefix == self.stage


def sets_of(trainer: L.Trainer | None, stage: Stage) -> EvaluationSets:
    """Return the sets that the evaluation in progress goes through.

    Loaders in a mapping have its names; several in a list are named by their index from 0.
    """
    loop: Any = None if trainer is None else trainer._evaluation_loop
    return EvaluationSets(stage, names_of_sets(getattr(loop, "_combined_loader", None)))


def names_of_sets(loaders: Any) -> tuple[str, ...]:  # noqa: ANN401 - Lightning's CombinedLoader, or None
    """Return the name of each set by the index of its loader; nothing for a single set without a name."""
    if loaders is None or loaders._mode != "sequential":  # other modes join the batches of all loaders
        return ()
    num_sets = len(loaders.flattened)
    given = loaders.iterables
    if isinstance(given, Mapping) and len(given) == num_sets:
        return tuple(map(str, given))
    return tuple(map(str, range(num_sets))) if num_sets > 1 else ()


def measured(metrics: MetricCollection | None) -> dict[str, Direction | None]:
    """Return the names of a set's metrics, each with its better direction.

    Example:
        >>> from torchmetrics import MeanSquaredError, MetricCollection, SumMetric
        >>> measured(MetricCollection({"mse": MeanSquaredError(), "sum": SumMetric()}))
        {'loss': 'min', 'mse': 'min', 'sum': None}
    """
    directions: dict[bool | None, Direction | None] = {True: "max", False: "min", None: None}
    found: dict[str, Direction | None] = {"loss": "min"}
    for name, metric in (metrics or {}).items():
        found[name] = directions[metric.higher_is_better]
    return found


class MeanLoss(Metric):
    """Mean over rows of the batches' mean losses."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    num_rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, num_rows: int) -> None:
        """Add a batch.

        Args:
            loss: Mean loss of the batch, scalar.
            num_rows: Number of its rows.
        """
        wide = loss.detach().to(torch.promote_types(loss.dtype, self.total.dtype))
        self.total = self.total + wide * num_rows
        self.num_rows = self.num_rows + num_rows

    def compute(self) -> Tensor:
        """Return the mean, scalar."""
        return self.total / self.num_rows


class Measures(nn.Module):
    """Measures of a set: its mean loss, the task's metrics and its table.

    Args:
        metrics: The metrics, or None.
        table: The table, or None.
    """

    def __init__(self, metrics: MetricCollection | None, table: TableMetric | None = None) -> None:
        super().__init__()
        self.loss = MeanLoss()
        self.metrics = metrics
        self.table = table

    def update(self, output: StepOutput, num_rows: int) -> None:
        """Count a batch."""
        self.loss.update(output.loss, num_rows)
        if self.metrics is not None:
            self.metrics.update(output.predictions, output.targets)
        if self.table is not None:
            self.table.update(output.predictions, output.targets)

    def take_table(self) -> Table | None:
        """Return the table of all ranks, and start a new one."""
        if self.table is None:
            return None
        table = self.table.table()
        self.table.reset()
        return table

    def named(self) -> Iterator[tuple[str, Metric]]:
        """Return the metrics by the names that they are logged under."""
        yield "loss", self.loss
        if self.metrics is not None:
            # As Lightning logs a collection: metrics with the same state share it.
            yield from self.metrics.items(copy_state=False)
