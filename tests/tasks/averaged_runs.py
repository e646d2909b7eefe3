"""A tiny task and data for runs whose weights are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning.callbacks import AdapterCheckpoint
from lora_lightning.methods import LoRA
from lora_lightning.optim import Optim
from lora_lightning.tasks import AdapterTask, StepOutput


class Counted(AdapterTask):
    """Notes the adapter weights of each validation."""

    validated: dict[int, dict[str, Tensor]]

    def configure_backbone(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

    def compute_loss(self, batch: Any) -> StepOutput:
        x, y = batch
        return StepOutput(nn.functional.cross_entropy(self.adapted(x), y))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Validate, and note with which weights."""
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            state = {name: tensor.clone() for name, tensor in self.adapter_state().items()}
            self.validated = {**getattr(self, "validated", {}), self.trainer.global_step: state}


def build_task() -> Counted:
    method = LoRA(r=2, target_modules=["0", "2"])
    return Counted(method=method, optim=Optim(lr=5e-2, schedule="constant"))


def loader() -> DataLoader[Any]:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def fit(folder: Path, callback: L.Callback | None, max_epochs: int = 3, **settings: Any) -> tuple[Counted, L.Trainer]:
    """Train and keep the checkpoint of each epoch."""
    task = build_task()
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=[AdapterCheckpoint(dirpath=folder, save_top_k=-1), *([] if callback is None else [callback])],
    )
    trainer.fit(task, loader(), loader(), **settings)
    return task, trainer
