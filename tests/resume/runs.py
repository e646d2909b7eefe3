"""Runs that are saved at chosen batches and resumed: a tiny model, rows of different lengths, every kind of loader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lora_lightning import AdapterTask, LoRA, Optim, PerTokenTask, StepOutput, TokenSums, adapter_state_dict
from lora_lightning.adapters import Method
from lora_lightning.data.base import TokenizedData
from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.batches.columns import EncodedRows

NUM_ROWS, BATCH_SIZE, NUM_EPOCHS = 26, 4, 3
NUM_BATCHES = 7  # in an epoch, the last one with two rows


def token_rows(num: int = NUM_ROWS) -> list[list[int]]:
    generator = np.random.default_rng(4)
    return [generator.integers(1, 30, size=generator.integers(2, 9)).tolist() for _ in range(num)]


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Reader(AdapterTask):
    """Guesses from the tokens of a row whether their sum is even; its backbone drops out values."""

    def __init__(self, method: Method | list[Method] | None = None, optim: Optim | None = None) -> None:
        super().__init__(method=method or LoRA(r=2, dropout=0.2, target_modules=["2", "5"]), optim=optim or Optim())

    def configure_backbone(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return nn.Sequential(
                *(nn.Embedding(30, 8), Pool(), nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh()),
                *(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)),
            )

    def compute_loss(self, batch: dict[str, Tensor]) -> StepOutput:
        return StepOutput(F.cross_entropy(self.adapted(batch["input_ids"]), batch["labels"]))


class TokenCounter(PerTokenTask):
    """Guesses each token's remainder by three; backward runs on sums over tokens."""

    def __init__(self, method: Method | list[Method] | None = None, optim: Optim | None = None) -> None:
        super().__init__(method=method or LoRA(r=2, dropout=0.2, target_modules=["2", "5"]), optim=optim or Optim())

    configure_backbone = Reader.configure_backbone

    def token_sums(self, batch: dict[str, Tensor]) -> TokenSums:
        ids = batch["input_ids"]
        logits, targets = self.adapted(ids.reshape(-1, 1)), ids.reshape(-1) % 2
        counted = ids.reshape(-1) != 0
        loss = F.cross_entropy(logits[counted], targets[counted], reduction="sum")
        return TokenSums(loss, int(counted.sum()), (logits.argmax(-1) == targets)[counted].sum())


class Tokens(TokenizedData):
    """The rows in a data module of this library."""

    def __init__(self, num_workers: int = 0, batch_size: int = BATCH_SIZE, num_rows: int = NUM_ROWS) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=None,
            group_by_length=True,
            seed=3,
            num_workers=num_workers,
            tokenizer=None,
        )
        self.num_rows = num_rows

    def _read(self) -> None:
        self.counts, self.fingerprint = {"train": self.num_rows, "val": 6}, str(self.num_rows)

    def _prepare(self) -> None:
        """Nothing is to be tokenized."""

    def _encode(self, split: str) -> EncodedRows:
        rows = token_rows(self.counts[split])
        return EncodedRows({"input_ids": rows, "labels": [sum(row) % 2 for row in rows]})

    def _collate(self) -> PadToLongest:
        return PadToLongest()

    @property
    def _splits_read(self) -> list[str]:
        return ["train", "val"]


class Noisy(Dataset[dict[str, Any]]):
    """The rows, of which a token changes at random whenever they are read."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = list(token_rows()[place])
        row[0] = int(torch.randint(1, 30, ()))
        row[1] = int(np.random.randint(1, 30))
        return {"input_ids": row, "labels": sum(row) % 2}


class PlainLoaders(L.LightningDataModule):
    """Loaders as a user writes them; validation is shuffled too."""

    def __init__(self, num_workers: int = 0, seed: int | None = None) -> None:
        super().__init__()
        self.num_workers, self.seed = num_workers, seed

    def train_dataloader(self) -> DataLoader[Any]:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return DataLoader(
            Noisy(),
            BATCH_SIZE,
            shuffle=True,
            num_workers=self.num_workers,
            collate_fn=PadToLongest(),
            generator=generator,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(), BATCH_SIZE, shuffle=True, collate_fn=PadToLongest())


@dataclass
class Trace(L.Callback):
    """Writes down the loss and the rows of each batch, and saves a checkpoint after some of them."""

    folder: Path | None = None
    save_after: Iterable[int] = ()
    losses: dict[int, float] = field(default_factory=dict)
    rows: dict[int, list[list[int]]] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)
    num_validations: int = 0
    also: Any = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        number = trainer.fit_loop.total_batch_idx + 1
        self.losses[number] = float(outputs["loss"])
        self.rows[number] = batch["input_ids"].tolist()
        self.epochs[number] = trainer.current_epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.num_validations += 1


class SaveAfter(L.pytorch.callbacks.Checkpoint):
    """Saves after some batches, where ModelCheckpoint does: after all other callbacks."""

    def __init__(self, folder: Path, batches: Iterable[int], *, at: str = "batch") -> None:
        self.folder, self.batches, self.at = folder, set(batches), at

    def _save(self, trainer: L.Trainer, at: str) -> None:
        number = trainer.fit_loop.total_batch_idx + 1
        if at == self.at and number in self.batches:
            trainer.save_checkpoint(self.folder / f"{number}.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._save(trainer, "epoch")


def fit(
    task: L.LightningModule,
    data: L.LightningDataModule,
    *callbacks: L.Callback,
    seed: int = 11,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> tuple[Trace, dict[str, Tensor]]:
    """Train; return what happened and the final weights. The seed differs between a run and its continuation."""
    L.seed_everything(seed, verbose=False)
    trace = Trace()
    usual: dict[str, Any] = {"devices": 1, "max_epochs": NUM_EPOCHS, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(one, L.pytorch.callbacks.Checkpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[trace, *callbacks],
        **{**usual, **settings},
    )
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return trace, {name: tensor.clone() for name, tensor in adapter_state_dict(task.adapted).items()}
