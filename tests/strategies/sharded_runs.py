"""The same short runs in one process and over two ranks, for the tests of FSDP2; run as a file it is the two ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lora_lightning import AdaLoRA, DoRA, LoRA, Optim, PrefixTuning, VeRA, adapter_state_dict
from lora_lightning.callbacks import AdapterCheckpoint
from lora_lightning.tasks import AdapterTask
from tests.ranks import leave
from tests.tasks.languages import Speaker
from tests.tasks.languages import batches as language_batches
from tests.tasks.toys import Tagger, trainer

WORLD = 2
OPTIM = Optim(lr=1e-2, schedule="constant")


def tagger() -> AdapterTask:
    return Tagger(method=LoRA(r=4, target_modules=["linear1", "linear2"], modules_to_save=["3"]), optim=OPTIM)


def speaker(method: Any, dtype: torch.dtype = torch.float64) -> AdapterTask:
    return Speaker("llama", dtype, method=method, optim=OPTIM)


TASKS: dict[str, Callable[[], AdapterTask]] = {
    "head": tagger,
    "half": lambda: speaker(LoRA(r=3, target_modules="all-linear"), torch.bfloat16),
    "mixed": lambda: speaker([DoRA(r=2, target_modules=["q_proj"]), PrefixTuning(num_virtual_tokens=3)]),
    "adalora": lambda: speaker(AdaLoRA(init_r=4, target_r=2, target_modules=["v_proj"], t_init=1, t_final=1)),
    "vera": lambda: speaker(VeRA(r=8, target_modules=["q_proj", "down_proj"])),
    "eva": lambda: speaker(LoRA(r=2, init="eva", target_modules=["up_proj"])),
}


def batches(task: AdapterTask) -> list[Any]:
    """Return four batches of eight rows."""
    if isinstance(task, Speaker):
        return language_batches((9, 5, 12, 7), rows=8)
    x = torch.randint(0, 20, (32, 5), generator=torch.Generator().manual_seed(3))
    return [[part, part.sum(1) % 3] for part in x.split(8)]


def share(batch: Any, rank: int) -> Any:
    """Return the rows of a batch that one rank gets."""
    rows = slice(4 * rank, 4 * rank + 4)
    return {k: v[rows] for k, v in batch.items()} if isinstance(batch, dict) else [part[rows] for part in batch]


def fit(name: str, folder: Path, strategy: Any = "auto", ckpt_path: Path | None = None) -> tuple[L.Trainer, Any]:
    """Train for eight batches, two to a step, from a seed that each rank has for itself; return trainer and task."""
    run = trainer(
        devices=1 if strategy == "auto" else WORLD,
        strategy=strategy,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        enable_checkpointing=True,
        callbacks=[AdapterCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)],
    )
    torch.manual_seed(100 + run.global_rank)
    task = TASKS[name]()
    parts = batches(task)
    if strategy != "auto":
        parts = [share(batch, run.global_rank) for batch in parts]
    run.fit(task, DataLoader(parts, batch_size=None, shuffle=False), ckpt_path=ckpt_path)
    return run, task


def state_of(task: AdapterTask) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state_dict(task.adapted).items()}


def refusals(task: AdapterTask) -> dict[str, str]:
    """Return what is said when a sharded model is to be detached, merged or copied."""
    import copy

    from lora_lightning import detach, merge

    said = {}
    for action in (detach, merge, copy.deepcopy):
        try:
            action(task.adapted)
        except ValueError as error:
            said[action.__name__] = str(error)
    return said


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in TASKS:
        # Lightning's own strategy must do as well as the library's.
        own = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
        run, task = fit(name, out / name, own if name == "half" else "fsdp2")
        sharded = [hasattr(parameter, "device_mesh") for parameter in task.adapted.parameters()]
        results[name] = {"state": state_of(task), "sharded": sum(sharded)}
    results["refused"] = refusals(task)
    _, task = fit("head", out / "resumed", "fsdp2", out / "head" / "epoch=0-step=2.ckpt")
    results["resumed"] = {"state": state_of(task)}
    _, task = fit("head", out / "ddp", "ddp")
    results["ddp"] = {"state": state_of(task)}
    torch.save(results, out / f"{run.global_rank}.pt")
    leave()
