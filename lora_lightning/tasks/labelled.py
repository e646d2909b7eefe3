"""Tasks with named classes: the names come from the data or the settings, and classes may have weights in the loss."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_lightning.checks.monitors import Direction
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.base import AdapterTask
from lora_lightning.tasks.class_weights import ClassWeights, balanced_weights, weights_by_name
from lora_lightning.tasks.step_output import StepOutput


class LabelledTask(AdapterTask, abc.ABC):
    """A task whose head has an output for each of some named classes; subclass it and define `compute_loss`.

    Args:
        label_names: Names of the classes by index; None takes those that the data module finds, else those
            of `adapter`.
        class_weights: Weight of each class in the loss by its name; classes left out weigh 1. `balanced` weighs each
            class by n / (number of classes x its rows), from the data module's `label_counts` of the training rows.

    Attributes:
        loss_weights: The weights by index `[classes]`, float32; None where all weigh 1.
    """

    loss_weights: Tensor | None
    placeholder_names: ClassVar[tuple[str, ...]] = ("one", "other")
    """Names for memory planning, where the number of classes is unknown; the head is small."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - those of AdapterTask
        label_names: list[str | int] | None = None,
        class_weights: ClassWeights | None = None,
        **settings: Any,  # noqa: ANN401 - those of AdapterTask
    ) -> None:
        super().__init__(*args, **settings)
        self.label_names = None if label_names is None else [str(name) for name in label_names]
        if self.label_names is not None:
            self.check_label_names(self.label_names)
        if isinstance(class_weights, str) and class_weights != "balanced":
            raise ConfigError(f"class_weights takes weights by label, or balanced; got {class_weights!r}.")
        self.class_weights = class_weights
        self.register_buffer("loss_weights", None, persistent=False)
        self.keep_settings(label_names=self.label_names, class_weights=class_weights)

    def check_label_names(self, names: list[str]) -> None:
        """Refuse names that no head can be built for.

        Raises:
            ConfigError: They are fewer than two, or not all different.
        """
        if len(set(names)) < max(len(names), 2):
            raise ConfigError(f"label_names must be at least two different names, got {names!r}.")

    def find_label_names(self) -> list[str]:
        """Return the names that the data module has found, else those of the adapter to start from."""
        data = getattr(self._trainer, "datamodule", None)
        names = getattr(data, "label_names", None)
        if not names:
            facts = self.facts_of_adapter()
            names = None if facts is None else facts.label_names
        return list(names or [])

    def configure_model(self) -> None:
        """Take the label names from the data where none were given, then build the model."""
        if self.model is not None:
            super().configure_model()  # it may have been built before there was a Trainer
            return
        if self.label_names is None:
            names = self.find_label_names()
            if not names:
                raise ConfigError(
                    f"{type(self).__name__} needs label_names: give them, or a data module that finds them."
                )
            self.label_names = names
            self.keep_settings(label_names=names)
        self.loss_weights = self._loss_weights(self.label_names)
        super().configure_model()

    def _measured(self) -> dict[str, Direction | None]:
        """Return what is measured; the names of the figures are the same whatever the classes."""
        if self.label_names is not None:
            return super()._measured()
        self.label_names = list(self.placeholder_names)
        try:
            return super()._measured()
        finally:
            self.label_names = None

    def backbone_config(self) -> dict[str, Any]:
        """Return the label names in both directions, as transformers keeps them."""
        names = self.label_names or []
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}

    @abc.abstractmethod
    def compute_loss(self, batch: Any) -> StepOutput:  # noqa: ANN401 - the data module's own type
        """Return the loss of a batch, and what the metrics need."""

    def _loss_weights(self, names: list[str]) -> Tensor | None:
        """Return the weights by index; they are stored by name, since a checkpoint has no data module to count."""
        if not self.class_weights:
            return None
        if isinstance(self.class_weights, str):
            data = getattr(self._trainer, "datamodule", None)
            weights = balanced_weights(getattr(data, "label_counts", None), names)
        else:
            weights = weights_by_name(self.class_weights, names)
        self.keep_settings(class_weights=weights)
        return torch.tensor([weights.get(name, 1.0) for name in names])
