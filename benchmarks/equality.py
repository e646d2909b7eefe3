"""Before anything is timed: ours and PEFT's give the same loss and the same gradients on the same weights."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders import Contender, copy_state
from benchmarks.workloads import Batch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of a gradient over its largest element, by the precision of the base."""


def check_equal(ours: Contender, theirs: Contender, batch: Batch, dtype: torch.dtype) -> float:
    """Give both the same weights and compare loss and gradients.

    Returns:
        The largest difference, relative to the largest element of the loss or gradient it is found in.

    Raises:
        ValueError: It is above the tolerance.
    """
    copy_state(ours, theirs)
    losses = [contender.loss(batch) for contender in (ours, theirs)]
    for loss in losses:
        torch.autograd.backward(loss)
    gaps = {"loss": _gap(*losses)}
    for name, parameter in theirs.names.items():
        mine = ours.names[name]
        assert mine.grad is not None
        assert parameter.grad is not None
        gaps[name] = _gap(mine.grad, parameter.grad.view_as(mine.grad))
    for contender in (ours, theirs):
        for parameter in contender.trained:
            parameter.grad = None
    name, largest = max(gaps.items(), key=lambda item: item[1])
    if largest > TOLERANCE[dtype]:
        raise ValueError(f"Ours and PEFT's differ by {largest:.1e} in {name}: nothing is timed before they agree.")
    return largest


def _gap(mine: Tensor, theirs: Tensor) -> float:
    scale = theirs.detach().abs().max().clamp_min(1e-30)
    return float((mine.detach() - theirs.detach()).abs().max() / scale)
