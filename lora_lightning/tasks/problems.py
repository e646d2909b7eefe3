"""What a sequence classification can predict: one label, several labels, or numbers."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from lora_lightning.errors import DataError

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

ProblemName: TypeAlias = Literal["single_label", "multi_label", "regression"]


class Problem(abc.ABC):
    """Loss, metrics and predictions of one kind of target.

    Attributes:
        name: What the setting `problem` calls it.
        problem_type: What transformers calls it in a model's config.
        min_names: The least number of label names.
        default_names: Names where neither settings nor data give some.
    """

    name: ClassVar[ProblemName]
    problem_type: ClassVar[str]
    min_names: ClassVar[int] = 1
    default_names: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            logits: `[batch, names]`, float32.
            labels: The targets, as the problem has them.
            weights: Weight of each class `[names]`, or None.

        Raises:
            DataError: The labels are of another kind or shape.
        """

    @abc.abstractmethod
    def metrics(self, num_names: int) -> MetricCollection:
        """Return the metrics; they take logits and labels."""

    @abc.abstractmethod
    def answers(self, logits: Tensor, names: list[str], threshold: float) -> list[dict[str, Any]]:
        """Return the prediction for each row of `logits` `[batch, names]`."""

    def _refuse(self, labels: Tensor, expected: str) -> DataError:
        kind = str(labels.dtype).removeprefix("torch.")
        return DataError(
            f"problem: {self.name} needs labels {expected}; got {kind} {list(labels.shape)}. Set `problem` to what the "
            "data hold, for the task and for its data."
        )


class SingleLabel(Problem):
    """One class for each text; labels are int64 `[batch]`."""

    name = "single_label"
    problem_type = "single_label_classification"
    min_names = 2

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the cross-entropy; with weights, the weighted mean over the rows."""
        if labels.ndim != 1 or labels.is_floating_point():
            raise self._refuse(labels, "int64 [batch]")
        return F.cross_entropy(logits, labels, weight=weights)

    def metrics(self, num_names: int) -> MetricCollection:
        """Return accuracy and macro-F1."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_names, average="micro"),
                "f1": MulticlassF1Score(num_names, average="macro"),
            }
        )

    def answers(self, logits: Tensor, names: list[str], threshold: float) -> list[dict[str, Any]]:
        """Return `label` and `probabilities` by name."""
        del threshold
        rows = logits.softmax(-1).tolist()
        best = [max(range(len(row)), key=row.__getitem__) for row in rows]
        return [
            {"label": names[index], "probabilities": dict(zip(names, row, strict=True))}
            for index, row in zip(best, rows, strict=True)
        ]


class MultiLabel(Problem):
    """Any number of classes for each text; labels are 0 or 1, float32 `[batch, classes]`."""

    name = "multi_label"
    problem_type = "multi_label_classification"

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the binary cross-entropy, its mean over rows and classes; with weights, weighted over the classes."""
        if labels.shape != logits.shape:
            raise self._refuse(labels, f"of 0 and 1, float32 [batch, {logits.shape[1]}]")
        if weights is None:
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        of_class = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(0)
        return (of_class * weights).sum() / weights.sum()

    def metrics(self, num_names: int) -> MetricCollection:
        """Return macro-F1, micro-F1 and average precision."""
        del num_names
        from torchmetrics import MetricCollection

        from lora_lightning.tasks.row_metrics import AveragePrecision, MultilabelF1

        return MetricCollection(
            {
                "f1": MultilabelF1("macro"),
                "f1_micro": MultilabelF1("micro"),
                "average_precision": AveragePrecision(),
            }
        )

    def answers(self, logits: Tensor, names: list[str], threshold: float) -> list[dict[str, Any]]:
        """Return `labels`, those whose probability is at least the threshold, and `probabilities` by name."""
        probabilities = logits.sigmoid()
        answers = []
        for row, is_chosen in zip(probabilities.tolist(), (probabilities >= threshold).tolist(), strict=True):
            chosen = [name for name, yes in zip(names, is_chosen, strict=True) if yes]
            answers.append({"labels": chosen, "probabilities": dict(zip(names, row, strict=True))})
        return answers


class Regression(Problem):
    """One or more numbers for each text; labels are float32 `[batch]` or `[batch, targets]`."""

    name = "regression"
    problem_type = "regression"
    default_names = ("score",)

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the mean squared error over rows and targets."""
        del weights
        num_rows, num_targets = logits.shape
        fits = labels.numel() == logits.numel() and len(labels) == num_rows
        if not fits or not labels.is_floating_point():
            shape = "[batch]" if num_targets == 1 else f"[batch, {num_targets}]"
            raise self._refuse(labels, f"float32 {shape}")
        return F.mse_loss(logits, labels.reshape(logits.shape).float())

    def metrics(self, num_names: int) -> MetricCollection:
        """Return mean squared error, and Pearson's and Spearman's correlation."""
        del num_names
        from torchmetrics import MetricCollection

        from lora_lightning.tasks.row_metrics import Correlation, MeanSquaredError

        return MetricCollection(
            {"mse": MeanSquaredError(), "pearson": Correlation(), "spearman": Correlation(of_ranks=True)}
        )

    def answers(self, logits: Tensor, names: list[str], threshold: float) -> list[dict[str, Any]]:
        """Return `value`, or `values` by name if there are several targets."""
        del threshold
        rows = logits.tolist()
        if len(names) == 1:
            return [{"value": row[0]} for row in rows]
        return [{"values": dict(zip(names, row, strict=True))} for row in rows]


PROBLEMS: dict[str, Problem] = {one.name: one for one in (SingleLabel(), MultiLabel(), Regression())}
