"""A tiny run: a plain model, made-up batches with a mask, and a Trainer that writes into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning.adapters import Method
from lora_lightning.methods import LoRA
from lora_lightning.optim import Optim
from lora_lightning.tasks import AdapterTask, StepOutput

# What Lightning 2.6 says of its own accord: about its use of torch's pytree, and about loading in the main process.
LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
NUM_SAMPLES, BATCH_SIZE = 24, 4


class LineTask(AdapterTask):
    """Classifies vectors; logs a validation accuracy beside the loss."""

    def __init__(self, method: Method | None = None, optim: Optim | None = None) -> None:
        super().__init__(method=method or LoRA(r=2, target_modules=["0"]), optim=optim or Optim(lr=0.02))
        self.label_names = ["no", "yes"]

    def configure_backbone(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def compute_loss(self, batch: dict[str, Tensor]) -> StepOutput:
        logits = self.adapted(batch["x"])
        if not self.trainer.training:
            accuracy = (logits.argmax(-1) == batch["labels"]).float().mean()
            self.log("val/accuracy", accuracy, batch_size=len(logits))
        return StepOutput(nn.functional.cross_entropy(logits, batch["labels"]))


class LineData(L.LightningDataModule):
    """Vectors whose first number decides the label; every second position of the mask counts."""

    fingerprint = "toy"

    def __init__(self, *, with_mask: bool = True) -> None:
        super().__init__()
        self.with_mask = with_mask

    def samples(self, seed: int) -> list[dict[str, Tensor]]:
        x = torch.randn(NUM_SAMPLES, 8, generator=torch.Generator().manual_seed(seed))
        extra = {"attention_mask": torch.tensor([1, 0, 1, 0, 1])} if self.with_mask else {}
        return [{"x": row, "labels": (row[0] > 0).long(), **extra} for row in x]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples(1), batch_size=BATCH_SIZE)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples(2), batch_size=BATCH_SIZE)  # type: ignore[arg-type]


def make_trainer(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """Return a quiet Trainer: 2 epochs of 6 steps unless told otherwise."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "log_every_n_steps": 2,
        "enable_checkpointing": any(isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": CSVLogger(folder, name="run", version=0),
    }
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{**defaults, **settings},
    )


def fit(
    folder: Path,
    *callbacks: L.Callback,
    task: L.LightningModule | None = None,
    data: LineData | None = None,
    **settings: Any,
) -> L.Trainer:
    """Train the toy task; return the Trainer."""
    torch.manual_seed(0)
    trainer = make_trainer(folder, *callbacks, **settings)
    trainer.fit(task or LineTask(), data or LineData())
    return trainer
