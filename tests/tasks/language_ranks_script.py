"""Takes one optimizer step over two processes and writes down each rank's gradients and metrics; run as a file."""

import sys
from pathlib import Path

import torch

from tests.ranks import leave
from tests.tasks.languages import TARGETS, Speaker, batches, loader
from tests.tasks.toys import Recorder, trainer

if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    run = trainer(
        devices=2,
        strategy="ddp",
        accumulate_grad_batches=2,
        max_epochs=1,
        use_distributed_sampler=False,
    )
    method = [TARGETS, Recorder(host="model.norm", width=32, penalty=0.25)]
    task = Speaker(method=method, dtype=torch.float64)
    parts = batches()[run.global_rank :: 2]
    if run.global_rank == 1:  # a batch without a supervised token, on one rank alone
        parts.append({**parts[0], "labels": torch.full_like(parts[0]["labels"], -100)})
        parts.append(parts[-1])
    else:
        parts += batches((5, 7))
    run.fit(task, loader(parts), loader(parts))
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    torch.save({"gradients": task.gradients, "metrics": metrics}, out / f"{run.global_rank}.pt")
    leave()
