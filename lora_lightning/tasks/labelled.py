"""Tasks with named classes: the names come from the data or the settings, and may weigh differently in the loss."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters import Method
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.errors import ConfigError
from lora_lightning.optim import Optim
from lora_lightning.tasks.base import AdapterTask
from lora_lightning.tasks.settings import Recomputing
from lora_lightning.tasks.step_output import StepOutput


class LabelledTask(AdapterTask, abc.ABC):
    """A task whose head has an output for each of some named classes; subclass it and define `compute_loss`.

    Args:
        backbone: See `AdapterTask`.
        method: See `AdapterTask`.
        optim: See `AdapterTask`.
        label_names: Names of the classes by index; None takes those that the data module finds.
        class_weights: Weight of each class in the loss by its name; classes left out weigh 1.
        dtype: See `AdapterTask`.
        gradient_checkpointing: See `AdapterTask`.
        offload_activations: See `AdapterTask`.
        quantization: See `AdapterTask`.
        adapter: See `AdapterTask`.

    Attributes:
        loss_weights: The weights by index `[classes]`, float32; None where all weigh 1.
    """

    loss_weights: Tensor | None

    def __init__(
        self,
        backbone: str | None = None,
        method: Method | list[Method] | None = None,
        optim: Optim | None = None,
        label_names: list[str] | None = None,
        class_weights: dict[str, float] | None = None,
        dtype: str = "auto",
        gradient_checkpointing: Recomputing = False,
        offload_activations: bool = False,
        quantization: Quantization | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__(
            backbone=backbone,
            method=method,
            optim=optim,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            offload_activations=offload_activations,
            quantization=quantization,
            adapter=adapter,
        )
        if label_names is not None and len(set(label_names)) < max(len(label_names), 2):
            raise ConfigError(f"label_names must be at least two different names, got {label_names!r}.")
        self.label_names = label_names
        self.class_weights = class_weights
        self.register_buffer("loss_weights", None, persistent=False)
        self.keep_settings(label_names=label_names, class_weights=class_weights)

    def configure_model(self) -> None:
        """Take the label names from the data where none were given, then build the model."""
        if self.model is not None:
            super().configure_model()  # it may have been built before there was a Trainer
            return
        if self.label_names is None:
            data = getattr(self._trainer, "datamodule", None)
            self.label_names = getattr(data, "label_names", None)
            if not self.label_names:
                raise ConfigError(
                    f"{type(self).__name__} needs label_names: give them, or a data module that finds them."
                )
            self.keep_settings(label_names=self.label_names)
        self.loss_weights = self._loss_weights(self.label_names)
        super().configure_model()

    def backbone_config(self) -> dict[str, Any]:
        """Return the label names in both directions, as transformers keeps them."""
        names = self.label_names or []
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}

    @abc.abstractmethod
    def compute_loss(self, batch: Any) -> StepOutput:  # noqa: ANN401 - the data module's own type
        """Return the loss of a batch, and what the metrics need."""

    def _loss_weights(self, names: list[str]) -> Tensor | None:
        if not self.class_weights:
            return None
        unknown = [name for name in self.class_weights if name not in names]
        if unknown or any(weight < 0 for weight in self.class_weights.values()):
            raise ConfigError(
                f"class_weights must be at least 0, for labels among {', '.join(names)}; got {self.class_weights!r}."
            )
        return torch.tensor([float(self.class_weights.get(name, 1.0)) for name in names])
