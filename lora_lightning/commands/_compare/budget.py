"""The size at which a method trains a given number of parameters, computed on a model without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_lightning.adapters import Method, detach
from lora_lightning.backbones.attach import attach
from lora_lightning.backbones.skeleton import without_weights
from lora_lightning.commands._compare.ends import trainable_counts
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.tasks import AdapterTask
from lora_lightning.tasks.labelled import LabelledTask

MAX_SIZE = 1 << 16
_PROBE = 64


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A method of a size, and its cost.

    Args:
        method: The method.
        num_trainable: Parameters that it trains, without the head.
        size: Its size setting and the value, such as `r = 8`; empty if it has none.
        note: Remark on budget and size; may be empty.
        is_met: Whether the budget is met as closely as integer sizes allow.
    """

    method: Method
    num_trainable: int
    size: str = ""
    note: str = ""
    is_met: bool = True


class Skeleton:
    """A task's model on the meta device, to which methods are attached for counting.

    Args:
        task: The task, not built; it is not changed.

    Raises:
        ConfigError: The model cannot be built without its weights.
    """

    def __init__(self, task: AdapterTask) -> None:
        if isinstance(task, LabelledTask) and task.label_names is None:
            task.label_names = task.find_label_names() or list(task.placeholder_names)
        try:
            with torch.device("meta"), without_weights():
                self.model = task.configure_backbone()
        except UserError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"{type(task).__name__} cannot be built without its weights, so that sizes cannot be counted "
                f"({' '.join(str(error).split()):.120})."
            ) from error
        self.head = task.trained_modules(self.model)
        self.num_base = sum(parameter.numel() for parameter in self.model.parameters())

    def count(self, method: Method) -> tuple[int, int]:
        """Return how many parameters a method trains outside the head, and how many the head has.

        Raises:
            UserError: The method does not fit the model.
        """
        with torch.device("meta"):
            attach(self.model, method, modules_to_save=self.head)
        try:
            return trainable_counts(self.model)
        finally:
            detach(self.model)


def sized(method: Method, budget: int | None, count: Callable[[Method], int]) -> Sized:
    """Return a method with the size at which its number of trained parameters is closest to a budget.

    Args:
        method: The method; its own size matters only without a budget.
        budget: Parameters to train, without the head; None does not change the method.
        count: Counts the parameters that a method trains; must not fall as its size grows.

    Returns:
        The method of that size; `is_met` is False if even the closest is more than half a step away.

    Raises:
        UserError: The method does not fit the model at any size.
    """
    setting = method.size_setting
    own = count(method) if budget is None or setting is None else 0
    if budget is None:
        return Sized(method=method, num_trainable=own, size=_size(method, setting))
    if setting is None:
        return Sized(method=method, num_trainable=own, note="no size setting: it trains what it trains")
    known: dict[int, int | None] = {}

    def resized(size: int) -> Method:
        changes: dict[str, Any] = {setting: size}
        return replace(method, **changes)

    def counted(size: int) -> int | None:
        """Return the count at a size, None where the model does not allow it."""
        if size not in known:
            try:
                known[size] = count(resized(size))
            except UserError:
                if size == 1:
                    raise
                known[size] = None
        return known[size]

    if counted(1) == (counted(_PROBE) or counted(2)):
        note = f"{setting} changes nothing here: it trains what it trains"
        return Sized(method=method, num_trainable=count(method), size=_size(method, setting), note=note)
    below = _largest_below(budget, counted)
    near = [size for size in (below, below + 1) if counted(size) is not None]
    best = min(near, key=lambda size: (abs((counted(size) or 0) - budget), size))
    num = counted(best)
    assert num is not None
    chosen = resized(best)
    step = abs((counted(best + 1) or counted(best - 1) or 0) - num) if best > 1 or counted(2) else num
    is_met = 2 * abs(num - budget) <= step
    off = num / budget - 1
    note = "" if abs(off) < 0.02 else f"{abs(off):.0%} {'over' if off > 0 else 'under'} the budget"
    if not is_met:
        note = f"the budget of {budget:,} is out of reach: the nearest is {num:,} at {setting} = {best}"
    return Sized(method=chosen, num_trainable=num, size=f"{setting} = {best}", note=note, is_met=is_met)


def _largest_below(budget: int, counted: Callable[[int], int | None]) -> int:
    """Return the largest size, at least 1, whose count is allowed and not above the budget."""

    def fits(size: int) -> bool:
        num = counted(size)
        return num is not None and num <= budget

    low, high = 1, 2
    while high <= MAX_SIZE and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _size(method: Method, setting: str | None) -> str:
    value = None if setting is None else getattr(method, setting, None)
    return "" if value is None else f"{setting} = {value}"
