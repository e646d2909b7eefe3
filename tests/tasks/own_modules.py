"""Tasks of a user's own: constructors with `**kwargs`, and modules and buffers beside the adapted model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.tasks import AdapterTask, SequenceClassification, StepOutput


class Projected(AdapterTask):
    """A projection and a counter of its own beside the adapted model; the rest of the arguments are the base's."""

    seen: Tensor

    def __init__(self, width: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep_settings(width=width)
        self.projection = nn.Linear(8, width)
        self.register_buffer("seen", torch.zeros(()))

    def configure_backbone(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, batch: Any) -> Tensor:
        return self.projection(self.adapted(batch))

    def compute_loss(self, batch: Any) -> StepOutput:
        x, y = batch
        self.seen += len(x)
        return StepOutput(nn.functional.cross_entropy(self(x), y))


class Fixed(Projected):
    """Chooses an argument of the base itself, which a checkpoint must not hand in a second time."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dtype="float32", width=4, **kwargs)


class Passing(Projected):
    """Passes on whatever it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Clashing(AdapterTask):
    """Names a module of its own as its model names one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_module("0", nn.Linear(6, 8))

    def configure_backbone(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8))


class Scaled(SequenceClassification):
    """A transformers task with a temperature of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.temperature = nn.Parameter(torch.ones(()))


class Forgetful(Projected):
    """Keeps none of its arguments itself, and cannot do without the first."""

    def __init__(
        self, needed: int, temperature: float = 1.0, rename: Callable[[str], str] = str, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.needed, self.temperature, self.rename = needed, temperature, rename
