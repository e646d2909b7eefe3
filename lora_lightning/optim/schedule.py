"""Learning-rate schedules, counted in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

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


class RateSchedule(torch.optim.lr_scheduler.LambdaLR):
    """A schedule that keeps its own rates and weight decay when it loads the step of another one.

    torch's schedule restores the rates of the stopped run, so that a changed setting would have no effect. Without
    changes, both restore bit-identical values.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        self._decays = [group.get("weight_decay") for group in optimizer.param_groups]
        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the schedule, and its rates."""
        return {name: value for name, value in super().state_dict().items() if name != "_decays"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of a state, with the rates of this schedule; the optimizer must be loaded already."""
        rates, decays = self.base_lrs, self._decays
        super().load_state_dict(state_dict)
        self.base_lrs, self._decays = rates, decays
        groups = zip(self.optimizer.param_groups, rates, decays, self.lr_lambdas, strict=True)
        for group, rate, decay, factor in groups:
            group.update(initial_lr=rate, lr=rate * factor(self.last_epoch))
            if decay is not None:
                group["weight_decay"] = decay
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def build_schedule(optimizer: torch.optim.Optimizer, optim: Optim, num_steps: float) -> RateSchedule:
    """Build the schedule of an optimizer, to be stepped once per optimizer step.

    Args:
        optimizer: The optimizer.
        optim: Schedule and warm-up.
        num_steps: Number of optimizer steps of the run; infinite if the run has no end.

    Raises:
        ConfigError: The schedule, or a share as warm-up, needs the number of steps, and the run has no end.
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
    if 0 < num_steps <= num_warmup:
        percent = 100 * num_steps / (num_warmup + 1)
        rank_zero_warn(
            f"The run has {num_steps:g} optimizer steps and warmup is {num_warmup}, so the learning rate reaches only "
            f"{percent:.2g} % of lr. Set fewer warm-up steps, or a share such as optim.warmup: 0.1."
        )
    factor = partial(lr_factor, schedule=optim.schedule, num_warmup=num_warmup, num_steps=int(num_steps))
    return RateSchedule(optimizer, factor)
