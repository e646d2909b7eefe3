"""A task, data and methods so small that a comparison takes a second; trials run in this process unless asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lora_lightning.adapters import Adapter, Method, ModelView
from lora_lightning.tasks import AdapterTask, StepOutput

SPLITS_READ: list[str] = []
"""Every split whose batches somebody asked for, in order."""


class Points(AdapterTask):
    """Classifies points with a perceptron whose last layer is the head."""

    def configure_backbone(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def trained_modules(self, model: nn.Module) -> list[str]:
        return ["4"]

    def compute_loss(self, batch: dict[str, Any]) -> StepOutput:
        logits = self.adapted(batch["x"])
        return StepOutput(F.cross_entropy(logits, batch["y"]), logits, batch["y"])

    def configure_metrics(self):
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        return MetricCollection({"accuracy": MulticlassAccuracy(2, average="micro")})


class PointData(L.LightningDataModule):
    """Points, of which the sign of the sum is the class.

    Args:
        num_points: How many in each split.
        batch_size: Points in a batch.
    """

    def __init__(self, num_points: int = 32, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.num_points, self.batch_size = num_points, batch_size

    def _loader(self, split: str) -> DataLoader[Any]:
        SPLITS_READ.append(split)
        generator = torch.Generator().manual_seed(len(split))
        points = torch.randn(self.num_points, 8, generator=generator)
        rows: Any = [{"x": point, "y": int(point.sum() > 0)} for point in points]
        return DataLoader(rows, batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")


class ForgetfulData(PointData):
    """Does not keep what it was built with."""

    def __init__(self, num_points: int = 32) -> None:
        L.LightningDataModule.__init__(self)
        self.num_points, self.batch_size = num_points, 8


@dataclass(frozen=True, kw_only=True)
class Failing(Method):
    """Fits every model, and fails when it shall learn."""

    name: ClassVar[str] = "failing"

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        return iter(())

    def before_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        raise RuntimeError("no step\nfor me")
