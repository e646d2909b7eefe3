"""One label for each text."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters import Method
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.errors import ConfigError
from lora_lightning.optim import Optim
from lora_lightning.tasks.base import AdapterTask, StepOutput

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

log = logging.getLogger(__name__)


class SequenceClassification(AdapterTask):
    """Classifies texts with the architecture's own classification head, trained beside the adapters.

    Batches hold `input_ids` and `attention_mask` `[batch, length]` and `labels` `[batch]`. Logged: `train/loss`, and
    `val/…` and `test/…` of `loss`, `accuracy` (share of right answers) and `f1` (mean over the classes).

    Args:
        backbone: See `AdapterTask`.
        method: See `AdapterTask`.
        optim: See `AdapterTask`.
        label_names: Names of the classes by index; None takes those that the data module finds.
        class_weights: Weight of each class in the loss by its name; classes left out weigh 1.
        dtype: See `AdapterTask`.
        gradient_checkpointing: See `AdapterTask`.
        quantization: See `AdapterTask`.
        adapter: See `AdapterTask`.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    loss_weights: Tensor | None

    def __init__(
        self,
        backbone: str | None = None,
        method: Method | list[Method] | None = None,
        optim: Optim | None = None,
        label_names: list[str] | None = None,
        class_weights: dict[str, float] | None = None,
        dtype: str = "auto",
        gradient_checkpointing: bool = False,
        quantization: Quantization | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__(backbone, method, optim, dtype, gradient_checkpointing, quantization, adapter)
        if label_names is not None and len(set(label_names)) < max(len(label_names), 2):
            raise ConfigError(f"label_names must be at least two different names, got {label_names!r}.")
        self.label_names = label_names
        self.class_weights = class_weights
        self.register_buffer("loss_weights", None, persistent=False)
        self.keep_settings(label_names=label_names, class_weights=class_weights)

    def configure_model(self) -> None:
        """Take the label names from the data where none were given, then build the model."""
        if self.model is not None:
            return
        if self.label_names is None:
            data = getattr(self._trainer, "datamodule", None)
            self.label_names = getattr(data, "label_names", None)
            if not self.label_names:
                raise ConfigError(
                    "SequenceClassification needs label_names: give them, or a data module that finds them."
                )
            self.keep_settings(label_names=self.label_names)
        self.loss_weights = self._loss_weights(self.label_names)
        super().configure_model()

    def backbone_config(self) -> dict[str, Any]:
        """Return the label names in both directions, as transformers keeps them."""
        names = self.label_names or []
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}

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

    def _loss_weights(self, names: list[str]) -> Tensor | None:
        if not self.class_weights:
            return None
        unknown = [name for name in self.class_weights if name not in names]
        if unknown or any(weight < 0 for weight in self.class_weights.values()):
            raise ConfigError(
                f"class_weights must be at least 0, for labels among {', '.join(names)}; got {self.class_weights!r}."
            )
        return torch.tensor([float(self.class_weights.get(name, 1.0)) for name in names])
