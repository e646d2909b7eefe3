"""One label for each text."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.tasks.labelled import LabelledTask
from lora_lightning.tasks.step_output import StepOutput

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

log = logging.getLogger(__name__)


class SequenceClassification(LabelledTask):
    """Classifies texts with the architecture's own classification head, trained beside the adapters.

    Batches hold `input_ids` and `attention_mask` `[batch, length]` and `labels` `[batch]`. Logged: `train/loss`, and
    `val/…` and `test/…` of `loss`, `accuracy` (share of right answers) and `f1` (mean over the classes).
    Settings: see `LabelledTask`.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def configure_backbone(self) -> nn.Module:
        """Load the backbone with its classification head, and tell it which token pads.

        The heads of decoders look for the last token that does not pad: the tokenizer's padding token, where a data
        module has one, else the config's, else the end token.
        """
        model = super().configure_backbone()
        config: Any = model.config
        tokenizer = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is None:
            pad = getattr(config, "pad_token_id", None)
        if pad is None:
            end = getattr(config, "eos_token_id", None)
            pad = end[0] if isinstance(end, list) else end
            log.info("The backbone has no padding token; its end token (%s) pads.", pad)
        config.pad_token_id = pad
        return model

    def compute_loss(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the cross-entropy, weighted by class where asked, with logits `[batch, classes]` and labels."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self(inputs).logits.float()
        labels = batch["labels"]
        return StepOutput(F.cross_entropy(logits, labels, weight=self.loss_weights), logits, labels)

    def configure_metrics(self) -> MetricCollection:
        """Return accuracy and macro-F1."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        num_classes = len(self.label_names or [])
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
            }
        )

    def predict(self, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Return `label` and `probabilities` (by label name) for each text of a batch."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        names = self.label_names or []
        rows = self(inputs).logits.float().softmax(-1).tolist()
        return [
            {
                "label": names[max(range(len(row)), key=row.__getitem__)],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for row in rows
        ]
