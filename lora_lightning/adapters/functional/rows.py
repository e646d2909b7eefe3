"""Rows of a batch, taken apart for several adapters, with one gradient for the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TakeApart(torch.autograd.Function):
    """Takes rows out of a batch; backward puts their gradients into one tensor, instead of one for each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401 - autograd's own
        """Return the rows of each index."""
        ctx.shape = x.shape
        ctx.save_for_backward(*indices)
        return tuple(x.index_select(0, index) for index in indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's own
        """Return the gradient of the whole batch; zero where no part was taken."""
        whole = gradients[0].new_zeros(ctx.shape)
        for index, gradient in zip(ctx.saved_tensors, gradients, strict=True):
            whole.index_copy_(0, index, gradient)
        return whole, *[None] * len(gradients)


def take_apart(x: Tensor, indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return parts of a batch.

    Args:
        x: `[rows, ...]`.
        indices: The rows of each part; no row is in two of them.

    Returns:
        For each index `[its length, ...]`.

    Example:
        >>> take_apart(torch.tensor([1.0, 2.0, 3.0]), (torch.tensor([2, 0]), torch.tensor([1])))
        (tensor([3., 1.]), tensor([2.]))
    """
    if not x.requires_grad or not torch.is_grad_enabled():
        return tuple(x.index_select(0, index) for index in indices)
    parts: tuple[Tensor, ...] = _TakeApart.apply(x, *indices)  # type: ignore[no-untyped-call]  # torch's own
    return parts
