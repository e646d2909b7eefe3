"""Tables of an evaluation: confusion matrix, and counts of entities by type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lora_lightning.tasks.entities import entities, has_prefixes
from lora_lightning.tasks.token_loss import IGNORED


@dataclass(frozen=True)
class Table:
    """Counts with names.

    Args:
        title: What the table shows.
        columns: Names of the columns.
        rows: Names of the rows.
        counts: The counts `[rows][columns]`.
    """

    title: str
    columns: list[str]
    rows: list[str]
    counts: list[list[int]]


class TableMetric(Metric):
    """Counts of a table, summed over batches and ranks.

    Args:
        title: What the table shows.
        columns: Names of the columns.
        rows: Names of the rows.
        **settings: Those of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    counts: Tensor

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[str], **settings: Any) -> None:  # noqa: ANN401 - torchmetrics' own
        super().__init__(**settings)
        self.title, self.columns, self.rows = title, list(columns), list(rows)
        zeros = torch.zeros(len(self.rows), len(self.columns), dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the counts `[rows, columns]`, int64."""
        return self.counts

    def table(self) -> Table:
        """Return the counts with their names; all ranks must call it."""
        counts: Tensor = self.compute()
        return Table(self.title, self.columns, self.rows, counts.tolist())


class ConfusionTable(TableMetric):
    """Counts of rows by right class (row) and predicted class (column); takes logits `[batch, classes]`.

    Args:
        label_names: Names of the classes by index.
        **settings: Those of `torchmetrics.Metric`.
    """

    def __init__(self, label_names: Sequence[str], **settings: Any) -> None:  # noqa: ANN401 - torchmetrics' own
        super().__init__("Right class (rows) and predicted class (columns)", label_names, label_names, **settings)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count a batch: logits `[batch, classes]` and class indices `[batch]`."""
        num_classes = len(self.rows)
        pairs = targets * num_classes + predictions.argmax(-1)
        self.counts += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


class EntityTable(TableMetric):
    """Counts of entities of each type: found exactly, predicted only, expected only.

    Args:
        label_names: Name of each tag by its index.
        **settings: Those of `torchmetrics.Metric`.
    """

    def __init__(self, label_names: Sequence[str], **settings: Any) -> None:  # noqa: ANN401 - torchmetrics' own
        self.label_names = list(label_names)
        self.prefixed = has_prefixes(self.label_names)
        found = [entity.type for name in self.label_names for entity in entities([name], prefixed=self.prefixed)]
        types = list(dict.fromkeys(found))
        super().__init__("Entities of each type", ["found", "predicted only", "expected only"], types, **settings)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count a batch: predicted and expected tags `[batch, length]`, -100 where a token does not count."""
        counts: Counter[tuple[str, int]] = Counter()
        for row in zip(predictions.tolist(), targets.tolist(), strict=True):
            pairs = [(ours, right) for ours, right in zip(*row, strict=True) if right != IGNORED]
            ours = {*entities([self.label_names[one] for one, _ in pairs], prefixed=self.prefixed)}
            right = {*entities([self.label_names[one] for _, one in pairs], prefixed=self.prefixed)}
            for column, some in enumerate((ours & right, ours - right, right - ours)):
                counts.update((entity.type, column) for entity in some)
        for (kind, column), count in counts.items():
            self.counts[self.rows.index(kind), column] += count
