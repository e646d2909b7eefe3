"""A linear layer with a low-rank update, which each pass adds to its outcome or to the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lightning.adapters.functional.dropout import seeded_dropout
from lora_lightning.adapters.functional.forms import (
    NOT_REBUILT,
    Rebuilt,
    compute_dtype,
    low_rank_gradients,
    narrow,
    project,
    update_scale,
    with_known_signature,
)
from lora_lightning.adapters.functional.recompute import Source

Read = Callable[[], Tensor]


def low_rank_update(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """Compute s (drop(x) A^T) B^T alone, for hosts that compute their own product (4-bit and 8-bit linears).

    Args:
        x: Input, `[..., I]`.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        scaling: The factor s.
        p: Dropout probability on the input.
        seed: Dropout seed; None turns dropout off.

    Returns:
        The update, `[..., O]`.

    Example:
        >>> low_rank_update(torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1), 0.5)[0]
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    dtype = compute_dtype(x)
    dropped = x.to(dtype) if seed is None else seeded_dropout(x.to(dtype), p, seed)
    return F.linear(F.linear(dropped, lora_a.to(dtype)) * scaling, lora_b.to(dtype))


@with_known_signature
class LoRALinear(Function):
    """y = x W^T + b + s (drop(x) A^T) B^T (Hu et al. 2021, equation 3).

    With h = drop(x) A^T and g = dy B, both R wide, each pass puts the update where fewer numbers are touched, into its
    outcome or into the weight, V = W + s B A, a temporary:
        y = x W^T + b + s h B^T   or  y = x V^T + b,     dB = s dy^T h,
        dx = dy W + s drop'(g A)  or  dx = dy V,         dA = s g^T drop(x).
    The matrix product itself accumulates, so no extra pass over a token-sized tensor is made. Saves x (shared with
    every layer that reads it) or its source, unless A is frozen and h at hand, and h where forward had it.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | Read,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        p: float,
        seed: Tensor | None,
        source: Source | None,
        rebuilt: Rebuilt,
    ) -> tuple[Tensor, Tensor | None]:
        """Return y [N, O], and h [N, R] where the weight is not rebuilt."""
        del source
        dtype = compute_dtype(x)
        x_ni, w_oi = x.reshape(-1, x.shape[-1]).to(dtype), read(weight).to(dtype)
        if rebuilt.in_forward:
            w_oi = rebuild(w_oi, lora_a, lora_b, scaling)
        y_no = torch.mm(x_ni, w_oi.t()) if bias is None else torch.addmm(bias.to(dtype), x_ni, w_oi.t())
        if rebuilt.in_forward:
            return y_no, None
        h_nr = project(x_ni, lora_a, p, seed)
        y_no.addmm_(h_nr, lora_b.to(dtype).t(), alpha=update_scale(scaling, p, seed))
        return y_no, h_nr

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:  # noqa: ANN401 - torch's
        """Save x or its source where backward needs it, the parameters, h and the seed."""
        x, weight, _, lora_a, lora_b, ctx.scaling, ctx.p, seed, source, ctx.rebuilt = inputs
        _, h_nr = output
        if h_nr is not None:
            ctx.mark_non_differentiable(h_nr)
        ctx.x_shape, ctx.x_dtype, ctx.read = x.shape, x.dtype, None if isinstance(weight, Tensor) else weight
        kept = keep_input(ctx, x if ctx.needs_input_grad[3] or h_nr is None else None, source)
        ctx.save_for_backward(weight if ctx.read is None else None, lora_a, lora_b, h_nr, seed, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_no: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        """Return the gradients of x, A and B."""
        stored, lora_a, lora_b, h_nr, seed, *kept = ctx.saved_tensors
        x, dtype = restore_input(ctx, kept), dy_no.dtype
        x_ni = None if x is None else x.reshape(-1, x.shape[-1]).to(dtype)
        g_nr, dx_ni = narrow(dy_no, lora_b.to(dtype).t()), None
        if ctx.needs_input_grad[0]:
            w_oi = read(ctx.read or stored).to(dtype)
            dx_ni = dy_no @ (rebuild(w_oi, lora_a, lora_b, ctx.scaling) if ctx.rebuilt.in_backward else w_oi)
        scale = update_scale(ctx.scaling, ctx.p, seed)
        updated_ni = None if ctx.rebuilt.in_backward else dx_ni
        da_ri = low_rank_gradients(x_ni, g_nr, updated_ni, lora_a, scale, ctx.p, seed)
        if h_nr is None:
            assert x_ni is not None
            h_nr = project(x_ni, lora_a, ctx.p, seed)
        db_or = (h_nr.t() @ dy_no).t() * scale  # (h^T dy)^T is up to twice as fast as dy^T h
        dx = None if dx_ni is None else dx_ni.view(ctx.x_shape).to(ctx.x_dtype)
        da = None if da_ri is None else da_ri.to(lora_a.dtype)
        return dx, None, None, da, db_or.to(lora_b.dtype), None, None, None, None, None


def read(weight: Tensor | Read) -> Tensor:
    """Return W, [O, I], out of its storage where that is not W itself."""
    return weight if isinstance(weight, Tensor) else weight()


def rebuild(w_oi: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return V = W + s B A as a new tensor, [O, I]."""
    return torch.addmm(w_oi, lora_b.to(w_oi.dtype), lora_a.to(w_oi.dtype), alpha=scaling)


def keep_input(ctx: Any, x: Tensor | None, source: Source | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
    """Return the tensors to save for the input, its source's or itself, and note how to restore it."""
    ctx.restore = None if source is None or x is None else source.compute
    return (x,) if ctx.restore is None or source is None else source.tensors


def restore_input(ctx: Any, kept: list[Tensor | None]) -> Tensor | None:  # noqa: ANN401 - torch's context
    """Return the input from what `keep_input` had saved."""
    return kept[0] if ctx.restore is None else ctx.restore(*kept)


def lora_linear(
    x: Tensor,
    weight: Tensor | Read,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    source: Source | None = None,
    rebuilt: Rebuilt = NOT_REBUILT,
) -> Tensor:
    """Compute x W^T + b + s (drop(x) A^T) B^T; see `LoRALinear`.

    Args:
        x: Input, `[..., I]`.
        weight: Frozen W, `[O, I]`, or what reads it out of its storage.
        bias: Frozen b, `[O]`, or None.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        scaling: The factor s.
        p: Dropout probability on the input of A.
        seed: Dropout seed; None turns dropout off.
        source: What to keep for backward instead of x, as `find_source` returns it.
        rebuilt: In which passes the update goes into the weight, as `rebuilding_pays` tells; in none under dropout.

    Returns:
        The output, `[..., O]`.

    Raises:
        ValueError: A pass is to rebuild the weight under dropout, which acts on the input of A alone.

    Example:
        >>> lora_linear(torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1), 0.5)[0]
        tensor([4.5000, 4.5000, 4.5000, 4.5000])
    """
    if seed is not None and any(rebuilt):
        raise ValueError(f"Dropout acts on the input of A, so W + s B A can't hold it; got {rebuilt} with a seed.")
    y_no, _ = LoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling, p, seed, source, rebuilt)  # type: ignore[no-untyped-call] # torch's
    # Out here, since torch forbids in-place operations (a ReLU, a residual add) on a view made inside a Function.
    return y_no.view(*x.shape[:-1], y_no.shape[1])
