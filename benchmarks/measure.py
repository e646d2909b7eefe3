"""What a training step costs: time by rounds, and figures that depend on no clock."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import Contender
from benchmarks.workloads import Batch


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What depends on no clock.

    Args:
        saved_bytes: Bytes that the forward pass keeps for backward, without parameters and buffers.
        flops: Floating-point operations of the matrix products, forward and backward.
        peak_bytes: The most that the allocator holds at a time above what is there before the step.
        trained: Trained parameters.
    """

    saved_bytes: int
    flops: int
    peak_bytes: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of a step.

    Args:
        seconds: Of each round.
        to_bound: Ratios to the bound's time in the same round.
        to_peer: Ratios to the time of PEFT's counterpart in the same round; empty where there is none.
    """

    seconds: tuple[float, ...]
    to_bound: tuple[float, ...]
    to_peer: tuple[float, ...]


def quartiles(values: tuple[float, ...]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    first, median, third = statistics.quantiles(values, n=4)
    return first, median, third


class Stepper:
    """Makes training steps of one contender: forward, backward, AdamW."""

    def __init__(self, contender: Contender, batch: Batch) -> None:
        self.contender, self.batch = contender, batch
        trained = contender.trained
        # A rate of zero costs the same and changes nothing, so that every round computes the same.
        # Fused, as both our `fit` and transformers' Trainer, which PEFT's users run, step it.
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True) if trained else None

    def step(self) -> Tensor:
        """Make one step and return its loss."""
        loss = self.contender.loss(self.batch)
        torch.autograd.backward(loss)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def timed(self) -> float:
        """Return the seconds of one step: of this process on a CPU, of the device on a GPU."""
        if not self.batch["input_ids"].is_cuda:
            start = time.process_time()
            self.step()
            return time.process_time() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        begin.record()
        self.step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def time_all(
    steppers: Mapping[str, Stepper], peers: Mapping[str, str], *, rounds: int, warm_up: int
) -> dict[str, Timing]:
    """Time all contenders once a round, in an order drawn anew for each.

    What a step costs depends on the memory that the one before it left free, so no contender keeps its neighbour.

    Args:
        steppers: The contenders, `bound` among them.
        peers: Whom each is compared with beside the bound.
        rounds: Rounds that count.
        warm_up: Rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    order = random.Random(0)
    for index in range(warm_up + rounds):
        for name in order.sample([*steppers], len(steppers)):
            taken = steppers[name].timed()
            if index >= warm_up:
                seconds[name].append(taken)

    def ratios(name: str, other: str | None) -> tuple[float, ...]:
        if other not in seconds:
            return ()
        return tuple(mine / theirs for mine, theirs in zip(seconds[name], seconds[other], strict=True))

    return {
        name: Timing(seconds=tuple(taken), to_bound=ratios(name, "bound"), to_peer=ratios(name, peers.get(name)))
        for name, taken in seconds.items()
    }


def count(stepper: Stepper) -> Counts:
    """Count what a step of a contender keeps, computes and holds."""
    contender = stepper.contender
    stepper.step()  # lets caches fill
    saved = saved_bytes(contender, stepper.batch)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(contender.loss(stepper.batch))
    for parameter in contender.trained:
        parameter.grad = None
    trained = sum(parameter.numel() for parameter in contender.trained)
    return Counts(saved_bytes=saved, flops=counter.get_total_flops(), peak_bytes=peak_bytes(stepper), trained=trained)


def saved_bytes(contender: Contender, batch: Batch) -> int:
    """Return the bytes of the storages that autograd keeps, each once, without those of parameters and buffers."""
    model: nn.Module = contender.model
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no later one takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contender.loss(batch)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(stepper: Stepper) -> int:
    """Return the most bytes that a step holds at a time, above what is there before it."""
    if stepper.batch["input_ids"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stepper.step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stepper.step()
    result = profiler.profiler
    assert result is not None
    assert result.kineto_results is not None
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in result.kineto_results.events() if event.name() == "[memory]"
    )
    held = peak = 0
    for _, num_bytes in changes:
        held += num_bytes
        peak = max(peak, held)
    return peak
