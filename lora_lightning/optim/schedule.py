"""Learning-rate schedules, counted in optimizer steps."""

from __future__ import annotations

import math
from functools import partial

import torch

from lora_lightning.errors import ConfigError
from lora_lightning.optim.config import Optim, Schedule


def lr_factor(step: int, *, schedule: Schedule, num_warmup: int, num_steps: int) -> float:
    """Return the factor on every group's rate for optimizer step `step` (0 is the first).

    Args:
        step: Number of steps done.
        schedule: The decay after warm-up.
        num_warmup: Steps of linear warm-up; step k of them has factor (k + 1) / (num_warmup + 1).
        num_steps: All steps; the decay reaches zero after the last one.

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(lr_factor(s, schedule="linear", num_warmup=1, num_steps=5), 2) for s in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min((step - num_warmup) / max(num_steps - num_warmup, 1), 1.0)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(
    optimizer: torch.optim.Optimizer, optim: Optim, num_steps: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the schedule of an optimizer, to be stepped once per optimizer step.

    Args:
        optimizer: The optimizer.
        optim: Schedule and warm-up.
        num_steps: All optimizer steps of the run; infinite where the run has no end.

    Raises:
        ConfigError: The schedule, or a warm-up share, needs to know where the run ends, and it has no end.
    """
    share = 0 < optim.warmup < 1
    if not math.isfinite(num_steps):
        if optim.schedule != "constant" or share:
            raise ConfigError(
                f"schedule {optim.schedule!r} with warmup {optim.warmup:g} needs the number of steps; "
                "set trainer.max_steps or max_epochs."
            )
        num_steps = 0
    num_warmup = math.ceil(optim.warmup * num_steps) if share else int(optim.warmup)
    factor = partial(lr_factor, schedule=optim.schedule, num_warmup=num_warmup, num_steps=int(num_steps))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
