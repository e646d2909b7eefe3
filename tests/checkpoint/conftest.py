"""Tiny random models for the tests of adapter files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lora_lightning.backbones.storage.codecs  # noqa: F401 - registers how to read Conv1D
from tests import models


class ConvNet(nn.Module):
    """A plain torch model: a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.conv(x).relu().mean((2, 3)))


@pytest.fixture
def build_model() -> Callable[..., nn.Module]:
    """Return a function that builds the tiny model of a name, with the same weights for the same seed."""

    def build(name: str, seed: int = 0) -> nn.Module:
        if name != "conv":
            return models.build(name, seed)
        torch.manual_seed(seed)
        return ConvNet().eval()

    return build


@pytest.fixture
def logits() -> Callable[[nn.Module], torch.Tensor]:
    """Return a function that computes a model's outputs on a fixed input."""

    @torch.no_grad()
    def compute(model: nn.Module) -> torch.Tensor:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if isinstance(base, ConvNet):
            return model(torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(3)))
        return models.logits(model, models.inputs(base))

    return compute
