"""The command `lora-lightning plan`."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import torch

from lora_lightning import data as _data  # noqa: F401 - its classes are known by their short names
from lora_lightning.errors import ConfigError
from lora_lightning.paths import nearest
from lora_lightning.strategies.facts import shards_by_name
from lora_lightning.tasks import AdapterTask
from lora_lightning.tasks.labelled import LabelledTask
from lora_lightning.tasks.memory import MemoryPlan, plan_memory
from lora_lightning.tasks.memory_parts import MemoryPart

GIB = 1 << 30
GPUS = {
    "A10": 24,
    "A100": 80,
    "A100-40GB": 40,
    "A100-80GB": 80,
    "A6000": 48,
    "B200": 180,
    "H100": 80,
    "H200": 141,
    "L4": 24,
    "L40S": 48,
    "P100": 16,
    "RTX 2080 Ti": 11,
    "RTX 3060": 12,
    "RTX 3080": 10,
    "RTX 3090": 24,
    "RTX 4060": 8,
    "RTX 4080": 16,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "T4": 15,
    "V100": 16,
    "V100-32GB": 32,
}
"""GiB of memory of common GPUs; for a GPU with two sizes, the plain name means the more common one."""
RESERVED_BY_CUDA = 600 << 20
"""Memory of CUDA's context and the kernels' workspaces besides the tensors."""
DOES_NOT_FIT = 1
USUAL_LENGTH = 2048
"""Tokens in a row if the data do not set it."""
_LEAST_MEMORY = 1 << 20
"""A smaller number is one without its unit."""
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def plan(
    model: AdapterTask,
    data: L.LightningDataModule | None = None,
    trainer: dict[str, Any] | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    gpu: str | None = None,
    world_size: int | None = None,
    seed_everything: bool | int = True,
) -> int:
    """Report the memory that a config needs, part by part, and whether it fits a GPU.

    Nothing is loaded: the model is built from its config. Base, adapters, gradients and optimizer state are counted;
    activations are counted in a forward pass of tensors without data, every row at full length.

    Args:
        model: The task, as for `fit`; --config takes the same file as `fit`.
        data: The data, which set the batch size and the length; they are not read.
        trainer: The trainer's settings; precision, devices and strategy count.
        batch_size: Rows in a batch on each device; by default that of the data.
        length: Tokens in a row; by default the data's max_length, or 2,048.
        gpu: The GPU to fit: its name (A100, RTX 4090, ...) or its memory (24GB; a card's GB are GiB); by default the
            GPU of this machine, if there is one.
        world_size: Number of devices; by default that of the trainer.
        seed_everything: Not used; `fit` takes it.
    """
    del seed_everything
    settings = trainer or {}
    rows = _positive("batch_size", batch_size, getattr(data, "batch_size", None))
    tokens = _positive("length", length, None if data is None else getattr(data, "max_length", 0) or USUAL_LENGTH)
    num_devices = _world_size(settings) if world_size is None else world_size
    if num_devices < 1:
        raise ConfigError(f"world_size is {num_devices}: expected a whole number of at least 1.")
    room, room_name = _room(gpu)
    is_sharded = shards_by_name(settings.get("strategy"))
    if isinstance(model, LabelledTask) and model.label_names is None:
        model.label_names = model.find_label_names() or list(model.placeholder_names)
    planned = plan_memory(
        model,
        batch_size=rows,
        length=tokens,
        precision=_precision(settings),
        num_replicas=1 if is_sharded else num_devices,
        num_shards=num_devices if is_sharded else 1,
        device="cpu" if room is None else "cuda",
    )
    print(f"{type(model).__name__} on {model.backbone}, {_methods(model)}; {rows} x {tokens} tokens on each device")
    print("\n".join(table(planned, on_gpu=room is not None)))
    if room is None:
        print("Name a GPU with --gpu, such as A100, RTX 4090 or 24GB, to see whether it fits.")
        return 0
    verdict, fits = _verdict(planned, room, room_name)
    print(verdict)
    return 0 if fits else DOES_NOT_FIT


def table(planned: MemoryPlan, *, on_gpu: bool) -> list[str]:
    """Return a plan as lines of text.

    Args:
        planned: The plan.
        on_gpu: Whether to list what CUDA itself takes.
    """
    parts = [*planned.on_device, *([_cuda_part()] if on_gpu else [])]
    total = MemoryPart(name="total", num_bytes=sum(part.num_bytes for part in parts), how="")
    lines = [*parts, total, *(part for part in planned.parts if part.on_host)]
    width = max(len(part.name) for part in lines)
    return [f"  {part.name:<{width}}  {_size(part.num_bytes):>10}  {part.how}".rstrip() for part in lines]


def _cuda_part() -> MemoryPart:
    return MemoryPart(name="CUDA", num_bytes=RESERVED_BY_CUDA, how="assumed: context and workspaces")


def _verdict(planned: MemoryPlan, room: int, name: str) -> tuple[str, bool]:
    """Report whether a plan fits, and the largest batch that does."""
    usable = room - RESERVED_BY_CUDA
    largest, spare = planned.largest_batch(usable), usable - planned.num_bytes
    if spare >= 0:
        more = f"; batches up to {largest} would" if largest > planned.batch_size else ""
        return f"Fits {name}, with {_size(spare)} to spare{more}.", True
    if largest:
        advice = f"a batch of {largest} would"
    else:
        means = "quantization, gradient_checkpointing, offload_activations, or shorter rows"
        advice = f"not even a batch of one does: use {means}"
    return f"Does not fit {name}: {_size(-spare)} too much; {advice}.", False


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.1f} MiB"


def _positive(name: str, given: int | None, default: object) -> int:
    value = default if given is None else given
    if not isinstance(value, int):
        raise ConfigError(f"Neither --{name} nor data that say it are given; name it.")
    if value < 1:
        raise ConfigError(f"{name} is {value}: expected a whole number of at least 1.")
    return value


def _world_size(settings: dict[str, Any]) -> int:
    """Return the number of processes in a trainer's settings, 1 by default."""
    devices, num_nodes = settings.get("devices", 1), settings.get("num_nodes", 1)
    if isinstance(devices, str):
        devices = int(devices) if devices.isdigit() else 1
    count = len(devices) if isinstance(devices, list) else devices
    return max(int(count), 1) * int(num_nodes)


def _precision(settings: dict[str, Any]) -> str:
    short = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
    given = str(settings.get("precision") or "32-true")
    return short.get(given, given)


def _methods(task: AdapterTask) -> str:
    ranks = [getattr(method, "r", None) for method in task.methods]
    names = [type(method).__name__ for method in task.methods]
    return " and ".join(f"{name} (r {r})" if r else name for name, r in zip(names, ranks, strict=True))


def _room(gpu: str | None) -> tuple[int | None, str]:
    """Return the memory to fit into, in bytes, and how to call it.

    Raises:
        ConfigError: It is neither a known name nor a plausible amount of GPU memory.
    """
    if gpu is None:
        if not torch.cuda.is_available():
            return None, ""
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, properties.name
    plain = {_plain(name): name for name in GPUS}
    found = plain.get(_plain(gpu))
    if found is not None:
        return GPUS[found] * GIB, f"{found} ({GPUS[found]} GiB)"
    amount = _SIZE.fullmatch(gpu.strip())
    if amount is None:
        near = nearest(gpu, GPUS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(GPUS)}."
        raise ConfigError(f"gpu: {gpu!r} is neither an amount of memory, such as 24GB, nor a GPU known here; {hint}")
    num_bytes = int(float(amount[1]) * _UNITS[amount[2].upper()])
    if num_bytes < _LEAST_MEMORY:
        raise ConfigError(f"gpu: {gpu!r} means {num_bytes:,} bytes, which no GPU has; did you mean {amount[1]}GB?")
    return num_bytes, f"a GPU of {_size(num_bytes)}"


def _plain(name: str) -> str:
    """Return a GPU's name without maker, blanks and hyphens, in small letters."""
    return re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.lower())
