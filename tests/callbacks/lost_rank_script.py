"""Trains over two ranks, of which the second kills itself in the middle; run as a file."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L

from lora_lightning import LoRA
from lora_lightning.callbacks import AdapterCheckpoint, RankWatch
from lora_lightning.errors import RankLost
from tests.tasks.toys import Tagger, loader, trainer

LAST_STEP = 3


class Death(L.Callback):
    """Ends a process of rank 1 as the kernel ends one that is out of memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == LAST_STEP + 1:
            (self.folder / "died_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: Path, ckpt_path: Path | None = None, **settings: Any) -> L.Trainer:
    """Train for two epochs of some steps, with a checkpoint after each step but the fatal one."""
    run = trainer(
        **settings,
        enable_checkpointing=True,
        callbacks=[
            RankWatch(),
            Death(folder),
            AdapterCheckpoint(folder, every_n_train_steps=LAST_STEP, save_last=True),
        ],
    )
    task = Tagger(method=LoRA(r=2, target_modules=["linear1"]))
    run.fit(task, loader(num=96, batch_size=8), ckpt_path=ckpt_path)
    return run


if __name__ == "__main__":
    try:
        fit(Path(sys.argv[1]), devices=2, strategy="ddp")
    except RankLost as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)
