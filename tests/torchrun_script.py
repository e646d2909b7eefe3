"""Trains on one of two nodes under torchrun, with DDP and then with FSDP2; writes down where it ended."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch

from lora_lightning import LoRA, adapter_state_dict
from lora_lightning.callbacks import AdapterCheckpoint, RankWatch
from tests.ranks import leave
from tests.tasks.toys import Tagger, loader, trainer

if __name__ == "__main__":
    out = Path(sys.argv[1])
    ends = {}
    for strategy in ("ddp", "fsdp2"):
        L.seed_everything(0)
        run = trainer(
            num_nodes=2,
            strategy=strategy,
            max_epochs=1,
            enable_checkpointing=True,
            callbacks=[RankWatch(), AdapterCheckpoint(out / strategy)],
        )
        task = Tagger(method=LoRA(r=2, target_modules=["linear1"]))
        run.fit(task, loader())
        ends[strategy] = {
            "world": run.world_size,
            "node": run.node_rank,
            "address": run.strategy.cluster_environment.main_address,
            "state": adapter_state_dict(task.adapted),
        }
    torch.save(ends, out / f"{run.global_rank}.pt")
    leave()
