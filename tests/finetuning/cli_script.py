"""A user's own script: a LightningModule, a data module and a LightningCLI, none of which knows this library."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    """Classifies vectors."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width))
        self.head = nn.Linear(width, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        self.log("test_loss", self.training_step(batch, batch_idx))


class Data(L.LightningDataModule):
    """Random rows."""

    def _rows(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(32, 8, generator=generator)
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 4)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the rows."""
        return self._rows()

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the rows."""
        return self._rows()


if __name__ == "__main__":
    LightningCLI(Classifier, Data)
