"""A linear layer of learned magnitude and direction, in the same two forms as LoRA's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lora_lightning.adapters.functional.forms import (
    compute_dtype,
    low_rank_gradients,
    narrow,
    project,
    update_scale,
    with_known_signature,
)
from lora_lightning.adapters.functional.lora import Read, keep_input, read, rebuild, restore_input
from lora_lightning.adapters.functional.norms import MIN_NORM
from lora_lightning.adapters.functional.recompute import Source


@with_known_signature
class DoRALinear(Function):
    """y = c (x W^T + s (drop(x) A^T) B^T) + b with c = m / ‖V‖ per output row (Liu et al. 2024, equation 5).

    The norm is a constant in backward (section 4.3). Saves x or its source, y and h = drop(x) A^T; the magnitude's
    gradient needs nothing else, because y - b = m · V x / ‖V‖:
        dm = Σ dy (y - b) / m,  dx = (c dy) W + s drop'(c dy B A),  dA = s (c dy B)^T drop(x),  dB = s c dy^T h.
    A row whose magnitude is exactly zero (its weights were all zero) keeps it.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scaling: float,
        p: float,
        seed: Tensor | None,
        source: Source | None,
    ) -> tuple[Tensor, Tensor]:
        """Return y [N, O] and h [N, R]."""
        del source
        dtype = compute_dtype(x)
        x_ni, w_oi = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        h_nr = project(x_ni, lora_a, p, seed)
        y_no = torch.mm(x_ni, w_oi.t()).addmm_(h_nr, lora_b.to(dtype).t(), alpha=update_scale(scaling, p, seed))
        y_no.mul_((magnitude / norm).to(dtype))
        if bias is not None:
            y_no.add_(bias.to(dtype))
        return y_no, h_nr

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's
        """Save x or its source, y, h, the parameters and the seed."""
        x, weight, bias, lora_a, lora_b, magnitude, norm, scaling, ctx.p, seed, source = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.scale, ctx.x_shape, ctx.x_dtype = update_scale(scaling, ctx.p, seed), x.shape, x.dtype
        kept = keep_input(ctx, x, source)
        ctx.save_for_backward(weight, bias, lora_a, lora_b, magnitude, norm, *output, seed, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_no: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        """Return the gradients of x, A, B and the magnitude."""
        weight, bias, lora_a, lora_b, magnitude, norm, y_no, h_nr, seed, *kept = ctx.saved_tensors
        x = restore_input(ctx, kept)
        assert x is not None
        x_ni = x.reshape(-1, x.shape[-1]).to(dy_no.dtype)
        scale_o = (magnitude / norm).to(dy_no.dtype)
        dm_o = magnitude_gradient(dy_no, y_no, bias, magnitude)
        g_nr = narrow(dy_no, (lora_b.to(dy_no.dtype) * scale_o[:, None]).t())
        dx_ni = (dy_no * scale_o) @ weight.to(dy_no.dtype) if ctx.needs_input_grad[0] else None
        da_ri = low_rank_gradients(x_ni, g_nr, dx_ni, lora_a, ctx.scale, ctx.p, seed)
        assert da_ri is not None
        db_or = (h_nr.t() @ dy_no).t() * (scale_o[:, None] * ctx.scale)
        dx = None if dx_ni is None else dx_ni.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, da_ri.to(lora_a.dtype), db_or.to(lora_b.dtype), dm_o, None, None, None, None, None


@with_known_signature
class RebuiltDoRALinear(Function):
    """y = x (c V)^T + b with V = W + s B A and c = m / ‖V‖, the same function with the weight rebuilt.

    Saves x or its source, y and ‖V‖ `[O]`. The norm comes out of V itself, so nothing cancels:
        dm = Σ dy (y - b) / m,  dx = dy (c V),  dA = s (c dy B)^T x,  dB = s c dy^T (x A^T).
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | Read,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        scaling: float,
        source: Source | None,
    ) -> tuple[Tensor, Tensor]:
        """Return y [N, O] and ‖V‖ [O]."""
        del source
        x_ni, v_oi = x.reshape(-1, x.shape[-1]), rebuild(read(weight), lora_a, lora_b, scaling)
        norm_o = torch.linalg.vector_norm(v_oi, dim=1).clamp_min_(MIN_NORM)
        v_oi.mul_((magnitude / norm_o).to(v_oi.dtype)[:, None])
        y_no = torch.mm(x_ni, v_oi.t()) if bias is None else torch.addmm(bias.to(x.dtype), x_ni, v_oi.t())
        return y_no, norm_o

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's
        """Save x or its source, y, the norm and the parameters."""
        x, weight, bias, lora_a, lora_b, magnitude, ctx.scaling, source = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.x_shape, ctx.read = x.shape, None if isinstance(weight, Tensor) else weight
        stored = weight if ctx.read is None else None
        ctx.save_for_backward(stored, bias, lora_a, lora_b, magnitude, *output, *keep_input(ctx, x, source))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_no: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        """Return the gradients of x, A, B and the magnitude."""
        stored, bias, lora_a, lora_b, magnitude, y_no, norm_o, *kept = ctx.saved_tensors
        x = restore_input(ctx, kept)
        assert x is not None
        x_ni, a_ri, b_or = x.reshape(-1, x.shape[-1]), lora_a.to(dy_no.dtype), lora_b.to(dy_no.dtype)
        scale_o1 = (magnitude / norm_o).to(dy_no.dtype)[:, None]
        dx = None
        if ctx.needs_input_grad[0]:
            v_oi = rebuild(read(ctx.read or stored), lora_a, lora_b, ctx.scaling).mul_(scale_o1)
            dx = (dy_no @ v_oi).view(ctx.x_shape)
        da_ri = (narrow(dy_no, (b_or * scale_o1).t()).t() @ x_ni).mul_(ctx.scaling)
        db_or = (narrow(x_ni, a_ri).t() @ dy_no).t() * (scale_o1 * ctx.scaling)
        dm_o = magnitude_gradient(dy_no, y_no, bias, magnitude)
        return dx, None, None, da_ri.to(lora_a.dtype), db_or.to(lora_b.dtype), dm_o, None, None


def magnitude_gradient(dy_no: Tensor, y_no: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    """Return dm = Σ dy (y - b) / m over the tokens, [O]; zero where m is zero."""
    dm_o = (dy_no * y_no).sum(0, dtype=magnitude.dtype)
    if bias is not None:
        dm_o -= dy_no.sum(0, dtype=magnitude.dtype) * bias
    return torch.where(magnitude == 0, 0, dm_o / magnitude)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    source: Source | None = None,
) -> Tensor:
    """Compute c (x W^T + s (drop(x) A^T) B^T) + b with c = m / norm; see `DoRALinear`.

    Args:
        x: Input, `[..., I]`.
        weight: Frozen W, `[O, I]`.
        bias: Frozen b, `[O]`, or None.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        magnitude: m, `[O]`.
        norm: ‖W + s B A‖ of each row, `[O]`, as `dora_norm` computes it.
        scaling: The factor s.
        p: Dropout probability on the input of A.
        seed: Dropout seed; None turns dropout off.
        source: What to keep for backward instead of x, as `find_source` returns it.

    Returns:
        The output, `[..., O]`.

    Example:
        >>> factors = torch.ones(1, 3), torch.ones(4, 1), torch.full((4,), 2.0), torch.full((4,), 3.0)
        >>> dora_linear(torch.ones(2, 3), torch.ones(4, 3), None, *factors, 0.5)[0]
        tensor([3., 3., 3., 3.])
    """
    y_no, _ = DoRALinear.apply(x, weight, bias, lora_a, lora_b, magnitude, norm, scaling, p, seed, source)  # type: ignore[no-untyped-call] # torch's
    return y_no.view(*x.shape[:-1], y_no.shape[1])


def rebuilt_dora_linear(
    x: Tensor,
    weight: Tensor | Read,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float,
    source: Source | None = None,
) -> Tensor:
    """Compute x (c V)^T + b with V = W + s B A and c = m / ‖V‖; see `RebuiltDoRALinear`.

    Args:
        x: Input, `[..., I]`, of the weight's dtype.
        weight: Frozen W, `[O, I]`, or what reads it out of its storage.
        bias: Frozen b, `[O]`, or None.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        magnitude: m, `[O]`.
        scaling: The factor s.
        source: What to keep for backward instead of x, as `find_source` returns it.

    Returns:
        The output, `[..., O]`.

    Example:
        >>> factors = torch.zeros(1, 4), torch.ones(2, 1), torch.full((2,), 3.0)
        >>> rebuilt_dora_linear(torch.ones(1, 4), torch.ones(2, 4), None, *factors, 0.5)
        tensor([[6., 6.]])
    """
    y_no, _ = RebuiltDoRALinear.apply(x, weight, bias, lora_a, lora_b, magnitude, scaling, source)  # type: ignore[no-untyped-call] # torch's
    return y_no.view(*x.shape[:-1], y_no.shape[1])
