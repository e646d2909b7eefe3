"""Metrics over whole sets of rows: multi-label F1 and average precision, and correlations of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

DEFAULT_THRESHOLD = 0.5

# Pure functions.


def multilabel_f1(chosen: Tensor, targets: Tensor, *, average: str) -> Tensor:
    """Return the F1 of several labels for each row, scalar float64; a class without any label or guess counts 0.

    Args:
        chosen: Which labels are predicted, boolean `[rows, classes]`.
        targets: Which labels are right, boolean `[rows, classes]`.
        average: `macro` (mean over the classes) or `micro` (over all rows and classes together).
    """
    dims = (0, 1) if average == "micro" else (0,)
    num_hits = (chosen & targets).sum(dims).double()
    num_all = chosen.sum(dims) + targets.sum(dims)
    return (2 * num_hits / num_all.clamp_min(1)).mean()


def best_threshold(probabilities: Tensor, targets: Tensor) -> float | None:
    """Return the threshold with the largest micro-F1, midway between two probabilities.

    Args:
        probabilities: `[rows, classes]`, float32.
        targets: Which labels are right, boolean `[rows, classes]`.

    Returns:
        The threshold; None if no label is right anywhere, or a probability is not finite.
    """
    if not targets.any() or not torch.isfinite(probabilities).all():
        return None
    scores, order = probabilities.flatten().sort(descending=True)
    num_hits = targets.flatten()[order].long().cumsum(0)
    num_chosen = torch.arange(1, len(scores) + 1)
    f1 = 2 * num_hits.double() / (num_chosen + num_hits[-1])
    below = torch.cat([scores[1:], scores.new_zeros(1)])
    is_cut = scores > below  # equal scores are chosen together
    is_cut[-1] = True
    best = int(f1.where(is_cut, -1).argmax())
    middle = (scores[best] + below[best]) / 2
    return float(middle if middle > below[best] else scores[best])


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of each class with at least one right label, `[classes with labels]`.

    It is the sum of the precision at each distinct score times the gain in recall there, without interpolation.

    Args:
        scores: `[rows, classes]`; only their order counts.
        targets: Which labels are right, boolean `[rows, classes]`.
    """
    columns = targets.any(0).nonzero().flatten().tolist()
    return torch.stack([_average_precision(scores[:, column], targets[:, column]) for column in columns] or [_ZERO])


_ZERO = torch.zeros((), dtype=torch.float64)


def _average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    scores, order = scores.sort(descending=True)
    num_hits = targets[order].double().cumsum(0)
    is_last = torch.ones(len(scores), dtype=torch.bool)
    is_last[:-1] = scores[:-1] != scores[1:]  # rows of one score have no order among themselves
    num_hits, num_chosen = num_hits[is_last], is_last.nonzero().flatten() + 1
    gains = num_hits.diff(prepend=num_hits.new_zeros(1)) / num_hits[-1]
    return (gains * num_hits / num_chosen).sum()


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of two float64 vectors; 0 if one of them is constant."""
    if (x == x[0]).all() or (y == y[0]).all():
        return _ZERO
    x, y = x - x.mean(), y - y.mean()
    return (x / x.norm() * (y / y.norm())).sum()


def ranks(x: Tensor) -> Tensor:
    """Return the rank of each element from 1, in float64; equal elements share the mean of their ranks.

    Example:
        >>> ranks(torch.tensor([2.0, 5.0, 2.0])).tolist()
        [1.5, 3.0, 1.5]
    """
    _, places, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]


# Metrics.


class StoredRows(Metric):
    """A metric that needs all rows at once: it keeps predictions and targets `[rows, columns]`.

    In one collection such metrics share their state. States of several ranks are concatenated.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    predictions: list[Tensor]
    targets: list[Tensor]

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - torchmetrics' own
        super().__init__(**settings)
        self.add_state("predictions", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Keep a batch of predictions and targets, each `[batch]` or `[batch, columns]`."""
        self.predictions.append(predictions.detach().reshape(len(predictions), -1))
        self.targets.append(targets.detach().reshape(len(targets), -1))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return all predictions and targets `[rows, columns]` on the CPU, which supports float64."""
        return dim_zero_cat(self.predictions).cpu(), dim_zero_cat(self.targets).cpu()

    def compute(self) -> Tensor:
        """Return the metric, scalar float32."""
        return self.value(*self.rows()).float().to(self.device)

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the metric of all rows."""
        raise NotImplementedError  # a subclass defines it


class MultilabelF1(StoredRows):
    """F1 of the labels whose probability reaches `threshold`; takes logits and targets of 0 and 1.

    Args:
        average: `macro` (mean over the classes) or `micro` (over all rows and classes together).
        **settings: Those of `torchmetrics.Metric`.

    Attributes:
        threshold: The threshold.
        chooses: Whether `compute` first sets `threshold` to the `best_threshold` of the rows, if there is one.
    """

    def __init__(self, average: str = "macro", **settings: Any) -> None:  # noqa: ANN401 - torchmetrics' own
        super().__init__(**settings)
        self.average = average
        self.threshold = DEFAULT_THRESHOLD
        self.chooses = False

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the F1."""
        probabilities, is_right = predictions.sigmoid(), targets > 0.5
        best = best_threshold(probabilities, is_right) if self.chooses else None
        if best is not None:
            self.threshold = best
        return multilabel_f1(probabilities >= self.threshold, is_right, average=self.average)


class AveragePrecision(StoredRows):
    """Mean over the classes of their average precision; classes without a right label are left out."""

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the mean average precision; 0 if no class has a right label."""
        return average_precisions(predictions, targets > 0.5).mean()


class MeanSquaredError(StoredRows):
    """Mean over rows and targets of the squared error."""

    higher_is_better = False

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error."""
        return (predictions.double() - targets.double()).square().mean()


class Correlation(StoredRows):
    """Mean over the targets of the correlation between prediction and target; 0 where one of them is constant.

    Args:
        of_ranks: Correlate the ranks (Spearman), not the values (Pearson).
        **settings: Those of `torchmetrics.Metric`.
    """

    def __init__(self, of_ranks: bool = False, **settings: Any) -> None:  # noqa: ANN401 - torchmetrics' own
        super().__init__(**settings)
        self.of_ranks = of_ranks

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the mean correlation."""
        prepare = ranks if self.of_ranks else Tensor.double
        pairs = zip(predictions.unbind(1), targets.unbind(1), strict=True)
        return torch.stack([pearson(prepare(ours), prepare(theirs)) for ours, theirs in pairs]).mean()
