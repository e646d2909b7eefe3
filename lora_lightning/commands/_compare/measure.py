"""The cost of a training: memory, saved tensors, optimizer state, inference, and the checkpoint."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lora_lightning.adapters import adapter_state_dict, disabled, iter_adapters
from lora_lightning.commands._compare.ends import state_to_keep
from lora_lightning.errors import NotMergeable
from lora_lightning.tasks import AdapterTask

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_WARM_UP, _ROUNDS = 2, 9


def reset_peak() -> None:
    """Reset the process's peak memory, if the system supports it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # other systems than Linux, and sandboxes, keep the peak of the whole process
        _CLEAR.write_text(_RESET_PEAK)


def peak_memory() -> int:
    """Return the peak memory in bytes: allocated on the GPU if there is one, else of this process.

    On Linux, `getrusage` of a child includes the peak of its parent; the high-water mark in /proc is the child's own.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def saved_for_backward(model: nn.Module, loss_of: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward pass keeps for backward.

    Args:
        model: The model; its parameters and buffers are not counted.
        loss_of: Computes the loss of a batch.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no later storage takes an address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def optimizer_bytes(optimizers: list[torch.optim.Optimizer], model: nn.Module) -> int:
    """Return the bytes of the gradients and of the optimizer's state, as they are after a step."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    state = [
        value
        for optimizer in optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*gradients, *state])


def inference_overhead(model: nn.Module, run: Callable[[], Any]) -> float:
    """Return the time of a forward pass relative to the base's, measured alternately; 1 means no overhead.

    Args:
        model: The adapted model, in eval mode.
        run: Runs a forward pass.
    """
    ratios = []
    with torch.no_grad():
        for round_number in range(_WARM_UP + _ROUNDS):
            adapted = _seconds(run)
            with disabled(model):
                base = _seconds(run)
            if round_number >= _WARM_UP:
                ratios.append(adapted / base)
    return statistics.median(ratios)


def checkpoint_bytes(model: nn.Module, *, with_base: bool) -> int:
    """Return the size of the trained state: adapters and head, and the base if it was trained."""
    state = {**adapter_state_dict(model), **(state_to_keep(model) if with_base else {})}
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    return len(save(own))


def merges(model: nn.Module) -> bool:
    """Return whether every adapter can be folded into its host."""
    for _, host, adapter in iter_adapters(model):
        try:
            adapter.check_mergeable(host)
        except NotMergeable:
            return False
    return True


@contextmanager
def in_mode(task: AdapterTask, *, training: bool) -> Iterator[None]:
    """Put a task into train or eval mode for the block."""
    was_training = task.adapted.training
    task.adapted.train(training)
    try:
        yield
    finally:
        task.adapted.train(was_training)


def _seconds(run: Callable[[], Any]) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Synchronize with a GPU, so that times include its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
