"""Dropout that keeps a seed for backward instead of a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEVELS = 1 << 16
_WORDS_IN_DRAW = 4


@torch.library.custom_op("lora_lightning::seeded_mask", mutates_args=())
def seeded_mask(like: Tensor, p: float, seed: Tensor) -> Tensor:
    """Draw a mask that is 0 with probability `p` and else 1; it depends on shape, device and `seed` alone.

    Keeping the seed lets backward draw the same mask again. It is one opaque operator so that `torch.compile` keeps it
    inside a single graph. On the CPU each element takes 16 random bits, so that `p` is met to 1 / 131,072: torch's
    own Bernoulli takes seven times as long there, more than the linear layer it serves.

    Args:
        like: Tensor of the mask's shape, dtype and device; its values are not read.
        p: Probability of a zero, in [0, 1).
        seed: int64 scalar on the CPU, so that reading it never waits for a device.

    Returns:
        The mask, contiguous, of the shape and dtype of `like`.
    """
    generator = torch.Generator(device=like.device).manual_seed(int(seed))
    mask = torch.empty_like(like, memory_format=torch.contiguous_format)
    if like.device.type != "cpu":
        return mask.bernoulli_(1 - p, generator=generator)
    draws = torch.empty(-(-like.numel() // _WORDS_IN_DRAW), dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    words = draws.view(torch.int16)[: like.numel()].view(like.shape)
    return torch.ge(words, round(p * _LEVELS) - _LEVELS // 2, out=mask)


@seeded_mask.register_fake
def _(like: Tensor, p: float, seed: Tensor) -> Tensor:
    del p, seed
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@torch.library.custom_op("lora_lightning::seeded_dropout", mutates_args=())
def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Zero each element with probability `p` and scale the others by 1 / (1 - p); see `seeded_mask`.

    Args:
        x: Any shape and floating dtype.
        p: Probability of zeroing, in [0, 1).
        seed: int64 scalar on the CPU.

    Returns:
        A new tensor like `x`.
    """
    return seeded_mask(x, p, seed).mul_(x).div_(1 - p)


@seeded_dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    del p, seed
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_seed(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:  # noqa: ANN401 - torch's context
    del output
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _drop_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch's context
    (seed,) = ctx.saved_tensors
    return seeded_dropout(grad, ctx.p, seed), None, None


seeded_dropout.register_autograd(_drop_gradient, setup_context=_save_seed)


def draw_seed() -> Tensor:
    """Draw a dropout seed from torch's global generator, so that `seed_everything` and checkpointing govern it."""
    return torch.randint(2**62, (), dtype=torch.int64)
