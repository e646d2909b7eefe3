"""Multiple choice: one correct answer for each question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection

from lora_lightning.errors import DataError
from lora_lightning.tasks.base import AdapterTask
from lora_lightning.tasks.step_output import StepOutput

__all__ = ["MultipleChoice"]


class ChoiceAccuracy(MeanMetric):
    """Share of questions whose choice is right, however many choices each has."""

    higher_is_better = True  # type: ignore[assignment]  # the base class leaves it open

    def update(self, predictions: Tensor, targets: Tensor) -> None:  # type: ignore[override]  # as tasks call it
        """Count right choices; both `[batch]`."""
        super().update((predictions == targets).float())


class MultipleChoice(AdapterTask):
    """Chooses among answers with the architecture's own multiple-choice head, trained beside the adapters.

    Batches hold `input_ids` and `attention_mask` `[batch, choices, length]` (each choice with its question),
    `choice_mask` `[batch, choices]`, 0 where a question has fewer choices than another, and `labels` `[batch]`, the
    index of the correct choice. Logged: `train/loss`, and `val/…` and `test/…` of `loss` and `accuracy`.
    """

    auto_class: ClassVar[str] = "AutoModelForMultipleChoice"

    def compute_loss(self, batch: Mapping[str, Tensor]) -> StepOutput:
        """Return the cross-entropy over the choices, with scores `[batch, choices]` and labels `[batch]`.

        Raises:
            DataError: There are no labels, or the tokens are not of three dimensions.
        """
        if "labels" not in batch:
            raise DataError(
                f"MultipleChoice needs labels to compute a loss; the batch holds {', '.join(sorted(batch))}."
            )
        scores, labels = self._scores(batch), batch["labels"]
        return StepOutput(F.cross_entropy(scores, labels), scores.argmax(-1), labels)

    def configure_metrics(self) -> MetricCollection:
        """Return the share of right choices."""
        return MetricCollection({"accuracy": ChoiceAccuracy()})

    def predict(self, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return `choice` (its index) and `probabilities` of the choices for each question."""
        masks = batch.get("choice_mask")
        rows = self._scores(batch).softmax(-1)
        num = [rows.shape[1]] * len(rows) if masks is None else masks.sum(-1).tolist()
        return [
            {"choice": int(row.argmax()), "probabilities": row[:count].tolist()}
            for row, count in zip(rows, num, strict=True)
        ]

    def prediction_columns(self, prediction: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return `predicted_choice` (its index), `predicted_answer` (its text, if known), and all `probabilities`."""
        columns = {"predicted_choice": prediction["choice"]}
        if "answer" in prediction:
            columns["predicted_answer"] = prediction["answer"]
        return {**columns, "probabilities": prediction["probabilities"]}

    def _scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return float32 scores `[batch, choices]`, minus infinity where there is no choice."""
        if batch["input_ids"].dim() != 3:
            raise DataError(
                f"MultipleChoice needs token ids [batch, choices, length]; got {list(batch['input_ids'].shape)}."
            )
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "choice_mask")}
        scores: Tensor = self(inputs).logits.float()
        mask = batch.get("choice_mask")
        return scores if mask is None else scores.masked_fill(mask == 0, float("-inf"))
