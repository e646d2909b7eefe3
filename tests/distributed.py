"""Two gloo processes on one machine, for tests: one gradient step of several models, each rank on half a batch."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lora_lightning.adapters import Method, iter_roles
from lora_lightning.backbones.attach import attach
from tests import models

WORLD = 2


def gradients(case: tuple[str, Method], rank: int | None, rows: int = 2 * WORLD) -> dict[str, Tensor]:
    """Return the adapter gradients of one step on the first rows of a batch, or, under DDP, on this rank's share.

    All in float64: adapters that start at a part of the weight take it out again, which cancels in float32.
    """
    architecture, method = case
    model = models.build(architecture).double()
    attach(model, method)
    models.perturb(model).train()
    share = slice(0, rows) if rank is None else slice(2 * rank, 2 * rank + 2)
    inputs = models.inputs(model, batch=2 * WORLD)
    batch = {
        name: tensor[share].double() if tensor.is_floating_point() else tensor[share] for name, tensor in inputs.items()
    }
    # A mean over elements, of which each rank has as many: the mean over ranks is then the mean over the batch.
    wrapped: nn.Module = model if rank is None else nn.parallel.DistributedDataParallel(model)
    wrapped(**batch).logits.square().mean().backward()
    return {name: parameter.grad for name, parameter, _ in iter_roles(model) if parameter.requires_grad}


def _work(rank: int, cases: list[tuple[str, Method]], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    results = [gradients(case, rank) for case in cases]
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(cases: list[tuple[str, Method]], folder: Path) -> list[list[dict[str, Tensor]]]:
    """Run all cases in two fresh processes; return the gradients by rank and case."""
    mp.spawn(_work, (cases, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
