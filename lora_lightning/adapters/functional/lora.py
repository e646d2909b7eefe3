"""A linear layer with a low-rank update, in two forms: the update beside the product, or the weight rebuilt with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lightning.adapters.functional.dropout import seeded_dropout
from lora_lightning.adapters.functional.forms import compute_dtype, low_rank_gradients, narrow, project, update_scale
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


class LoRALinear(Function):
    """y = x W^T + b + s (drop(x) A^T) B^T (Hu et al. 2021, equation 3).

    Saves x (shared with every layer that reads it) or its source, unless A is frozen, and h = drop(x) A^T, R wide. The
    update is accumulated into the output, and into dx, by the matrix product itself, so no extra pass over a
    token-sized tensor is made:
        dx = dy W + s drop'(dy B A),  dA = s (dy B)^T drop(x),  dB = s dy^T h.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
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
        y_no = torch.mm(x_ni, w_oi.t()) if bias is None else torch.addmm(bias.to(dtype), x_ni, w_oi.t())
        y_no.addmm_(h_nr, lora_b.to(dtype).t(), alpha=update_scale(scaling, p, seed))
        return y_no, h_nr

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's
        """Save x or its source where A trains, the parameters, h and the seed."""
        x, weight, _, lora_a, lora_b, scaling, ctx.p, seed, source = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.scale, ctx.x_shape, ctx.x_dtype = update_scale(scaling, ctx.p, seed), x.shape, x.dtype
        kept = keep_input(ctx, x if ctx.needs_input_grad[3] else None, source)
        ctx.save_for_backward(weight, lora_a, lora_b, output[1], seed, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_no: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        """Return the gradients of x, A and B."""
        weight, lora_a, lora_b, h_nr, seed, *kept = ctx.saved_tensors
        x = restore_input(ctx, kept)
        x_ni = None if x is None else x.reshape(-1, x.shape[-1]).to(dy_no.dtype)
        g_nr = narrow(dy_no, lora_b.to(dy_no.dtype).t())
        dx_ni = dy_no @ weight.to(dy_no.dtype) if ctx.needs_input_grad[0] else None
        da_ri = low_rank_gradients(x_ni, g_nr, dx_ni, lora_a, ctx.scale, ctx.p, seed)
        db_or = (h_nr.t() @ dy_no).t() * ctx.scale  # (h^T dy)^T is up to twice as fast as dy^T h
        dx = None if dx_ni is None else dx_ni.view(ctx.x_shape).to(ctx.x_dtype)
        da = None if da_ri is None else da_ri.to(lora_a.dtype)
        return dx, None, None, da, db_or.to(lora_b.dtype), None, None, None, None


class RebuiltLoRALinear(Function):
    """y = x (W + s B A)^T + b, the same function with the weight rebuilt, in forward and again in backward.

    Saves x or its source. W + s B A is a temporary: it costs 2 R O I operations, and no pass over a token-sized tensor:
        dx = dy (W + s B A),  dA = s (dy B)^T x,  dB = s dy^T (x A^T).
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | Read,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        source: Source | None,
    ) -> Tensor:
        """Return y [N, O]."""
        del source
        x_ni, v_oi = x.reshape(-1, x.shape[-1]), rebuild(weight, lora_a, lora_b, scaling)
        return torch.mm(x_ni, v_oi.t()) if bias is None else torch.addmm(bias.to(x.dtype), x_ni, v_oi.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401 - torch's context
        """Save x or its source, and the parameters."""
        del output
        x, weight, _, lora_a, lora_b, ctx.scaling, source = inputs
        ctx.x_shape, ctx.read = x.shape, None if isinstance(weight, Tensor) else weight
        stored = weight if ctx.read is None else None
        ctx.save_for_backward(stored, lora_a, lora_b, *keep_input(ctx, x, source))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_no: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        """Return the gradients of x, A and B."""
        stored, lora_a, lora_b, *kept = ctx.saved_tensors
        x = restore_input(ctx, kept)
        assert x is not None
        x_ni, a_ri, b_or = x.reshape(-1, x.shape[-1]), lora_a.to(dy_no.dtype), lora_b.to(dy_no.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_no @ rebuild(ctx.read or stored, lora_a, lora_b, ctx.scaling)).view(ctx.x_shape)
        da_ri = (narrow(dy_no, b_or.t()).t() @ x_ni).mul_(ctx.scaling)
        db_or = (narrow(x_ni, a_ri).t() @ dy_no).t() * ctx.scaling
        return dx, None, None, da_ri.to(lora_a.dtype), db_or.to(lora_b.dtype), None, None


def rebuild(weight: Tensor | Read, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return W + s B A as a new tensor, [O, I]."""
    w_oi = weight if isinstance(weight, Tensor) else weight()
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
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    source: Source | None = None,
) -> Tensor:
    """Compute x W^T + b + s (drop(x) A^T) B^T; see `LoRALinear`.

    Args:
        x: Input, `[..., I]`.
        weight: Frozen W, `[O, I]`.
        bias: Frozen b, `[O]`, or None.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        scaling: The factor s.
        p: Dropout probability on the input of A.
        seed: Dropout seed; None turns dropout off.
        source: What to keep for backward instead of x, as `find_source` returns it.

    Returns:
        The output, `[..., O]`.

    Example:
        >>> lora_linear(torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1), 0.5)[0]
        tensor([4.5000, 4.5000, 4.5000, 4.5000])
    """
    y_no, _ = LoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling, p, seed, source)  # type: ignore[no-untyped-call] # torch's
    # Out here, since torch forbids in-place operations (a ReLU, a residual add) on a view made inside a Function.
    return y_no.view(*x.shape[:-1], y_no.shape[1])


def rebuilt_lora_linear(
    x: Tensor,
    weight: Tensor | Read,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    source: Source | None = None,
) -> Tensor:
    """Compute x (W + s B A)^T + b; see `RebuiltLoRALinear`, and `rebuilding_pays` for when.

    Args:
        x: Input, `[..., I]`, of the weight's dtype.
        weight: Frozen W, `[O, I]`, or what reads it out of its storage.
        bias: Frozen b, `[O]`, or None.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        scaling: The factor s.
        source: What to keep for backward instead of x, as `find_source` returns it.

    Returns:
        The output, `[..., O]`.

    Example:
        >>> rebuilt_lora_linear(torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1), 0.5)[0]
        tensor([4.5000, 4.5000, 4.5000, 4.5000])
    """
    y_no: Tensor = RebuiltLoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling, source)  # type: ignore[no-untyped-call] # torch's
    return y_no.view(*x.shape[:-1], y_no.shape[1])
