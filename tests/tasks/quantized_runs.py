"""A tiny classifier on a 4-bit base, its data, and its Trainer; run as a file, it trains over two processes."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lora_lightning import DoRA, LoRA, Optim, SequenceClassification
from lora_lightning.adapters import Method
from lora_lightning.backbones.quantization import Quantization
from tests import models

NUM_ROWS, LENGTH = 8, 7
LABELS = ["a", "b", "c"]
EXACT = Quantization(compute_dtype="float32")
METHODS = [LoRA(r=4, target_modules="all-linear"), DoRA(r=4, target_modules="all-linear")]


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, models.VOCABULARY, (NUM_ROWS, LENGTH), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]


def loader(batch_size: int = NUM_ROWS) -> DataLoader[Any]:
    return DataLoader(rows(), batch_size=batch_size)  # type: ignore[arg-type]


def task(folder: str, method: Method | None = None, **settings: Any) -> SequenceClassification:
    """Return the task, with SGD at a constant rate and nothing random but the adapters' start."""
    defaults = {
        "optim": Optim(lr=0.05, optimizer="SGD", schedule="constant"),
        "label_names": LABELS,
        "quantization": EXACT,
    }
    return SequenceClassification(folder, method or METHODS[0], **{**defaults, **settings})


def trainer(**settings: Any) -> L.Trainer:
    usual = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
    }
    return L.Trainer(**{**usual, **settings})


if __name__ == "__main__":
    backbone, out = sys.argv[1:]
    for method in METHODS:
        L.seed_everything(1, verbose=False)
        run, module = trainer(devices=2, strategy="ddp"), task(backbone, method)
        run.fit(module, loader(NUM_ROWS // 2), loader(NUM_ROWS // 2))
        torch.save(module.adapter_state(), Path(out, f"{method.name}-{run.global_rank}.pt"))
