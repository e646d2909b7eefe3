"""Trains the four modules over two ranks with DDP, each on half of every batch, stops and resumes; run as a file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lora_lightning import ExactResume, finetune
from tests.finetuning.modules import Gan, ImageClassifier, SelfSupervised, SentenceClassifier, rows
from tests.finetuning.runs import SETTINGS, finetuning, trained_state, trainer
from tests.ranks import leave
from tests.resume.runs import SaveAfter

NUM_ROWS, BATCH_SIZE, STOP = 24, 4, 4


class QuietImages(ImageClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Identity()


class QuietSentences(SentenceClassifier):
    def configure_model(self) -> None:
        super().configure_model()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


class QuietEncoder(SelfSupervised):
    def noise(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=1)


class QuietGan(Gan):
    def noise(self, x: Tensor) -> Tensor:
        return x[:, 4:]


QUIET = {ImageClassifier: QuietImages, SentenceClassifier: QuietSentences, SelfSupervised: QuietEncoder, Gan: QuietGan}
"""The modules without random numbers, so that the rows of a batch decide alone."""


class Halves(L.LightningDataModule):
    """Gives the ranks the rows of a batch in turn."""

    def __init__(self, cls: type[L.LightningModule], batch_size: int) -> None:
        super().__init__()
        self.data, self.batch_size = rows(cls, NUM_ROWS), batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.data, ranks, rank, shuffle=False)
        return DataLoader(self.data, self.batch_size, sampler=sampler)


def fit(
    cls: type[L.LightningModule],
    folder: Path,
    *,
    num_ranks: int = 1,
    batch_size: int = BATCH_SIZE,
    ckpt_path: Path | None = None,
    seed: int = 7,
    precision: Any = "64-true",
) -> dict[str, Tensor]:
    """Train, and return what a checkpoint would keep; double precision tells rounding from a fault."""
    L.seed_everything(seed, verbose=False)
    module = QUIET[cls]()
    module.configure_model()
    callback = finetuning(cls, method=replace(SETTINGS[cls]["method"], dropout=0.0))
    # Before the Trainer: starting processes draws random numbers.
    finetune(module, callback.methods, callback.module, modules_to_save=callback.modules_to_save)
    run = trainer(
        *(callback, ExactResume(), SaveAfter(folder, [] if ckpt_path else [STOP])),
        devices=num_ranks,
        strategy="ddp_find_unused_parameters_true" if num_ranks > 1 else "auto",
        max_epochs=1,
        precision=precision,
        use_distributed_sampler=False,
    )
    run.fit(module, Halves(cls, batch_size), ckpt_path=ckpt_path, weights_only=True)
    return trained_state(module)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    ends = {}
    for cls in QUIET:
        folder = out / cls.__name__
        half = {"num_ranks": 2, "batch_size": BATCH_SIZE // 2}
        exact = fit(cls, folder / "exact", **half)
        whole = fit(cls, folder, precision="32-true", **half)
        resumed = fit(cls, folder, precision="32-true", ckpt_path=folder / f"{STOP}.ckpt", seed=99, **half)
        ends[cls.__name__] = [exact, whole, resumed]
    rank = torch.distributed.get_rank()
    torch.save(ends, out / f"{rank}.pt")
    leave()
