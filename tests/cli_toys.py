"""A task and data small enough to run through the command line in a second."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lora_lightning.tasks import AdapterTask, StepOutput


class ToyTask(AdapterTask):
    """Classifies points with a frozen perceptron under adapters."""

    def configure_backbone(self):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def compute_loss(self, batch):
        logits = self.adapted(batch["x"])
        return StepOutput(F.cross_entropy(logits, batch["y"]), logits, batch["y"])


class OwnDataTask(ToyTask):
    """The same, with a training loader of its own."""

    def train_dataloader(self):
        return ToyData().train_dataloader()


class InterruptedTask(ToyTask):
    """Ends as if somebody pressed Ctrl-C."""

    def training_step(self, batch, batch_idx):
        raise KeyboardInterrupt


class BuggyTask(ToyTask):
    """Has a bug."""

    def training_step(self, batch, batch_idx):
        raise IndexError("a bug")


class ToyData(L.LightningDataModule):
    """Sixteen points.

    Args:
        num_points: How many.
        batch_size: Points in a batch.
    """

    def __init__(self, num_points: int = 16, batch_size: int = 4) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.num_points = num_points
        self.batch_size = batch_size

    def _loader(self):
        generator = torch.Generator().manual_seed(3)
        points = torch.randn(self.num_points, 4, generator=generator)
        rows = [{"x": point, "y": int(point.sum() > 0)} for point in points]
        return DataLoader(rows, batch_size=self.batch_size)

    def train_dataloader(self):
        return self._loader()

    def val_dataloader(self):
        return self._loader()

    def test_dataloader(self):
        return self._loader()
