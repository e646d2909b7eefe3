"""The autograd functions behind the linear adapters.

Shape suffixes: N tokens (all leading dimensions of an input flattened), I input features, O output features,
R rank. Weights are [O, I], lora_A is [R, I], lora_B is [O, R].

Every function works in the dtype of its input, or in autocast's where that is on; gradients come back in the dtype of
each parameter. Frozen weights get no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_MIN_NORM = 1e-30


@torch.library.custom_op("lora_lightning::seeded_dropout", mutates_args=())
def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Zero each element with probability `p` and scale the others by 1 / (1 - p); the mask depends on `seed` alone.

    Keeping the seed instead of the mask lets backward draw the same mask again. It is one opaque operator so that
    `torch.compile` keeps it inside a single graph.

    Args:
        x: Any shape and floating dtype.
        p: Probability of zeroing, in [0, 1).
        seed: int64 scalar on the CPU, so that reading it never waits for a device.

    Returns:
        A new tensor like `x`.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    mask = torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - p, generator=generator)
    return mask.mul_(x).div_(1 - p)


@seeded_dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    del p, seed
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_seed(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:  # noqa: ANN401
    del output
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _drop_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
    (seed,) = ctx.saved_tensors
    return seeded_dropout(grad, ctx.p, seed), None, None


seeded_dropout.register_autograd(_drop_gradient, setup_context=_save_seed)


def draw_seed() -> Tensor:
    """Draw a dropout seed from torch's global generator, so that `seed_everything` and checkpointing govern it."""
    return torch.randint(2**62, (), dtype=torch.int64)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in: autocast's where it is on, else the input's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


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


def _project(x_ni: Tensor, lora_a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return h = drop(x) A^T, [N, R]."""
    dropped_ni = x_ni if seed is None else seeded_dropout(x_ni, p, seed)
    return dropped_ni @ lora_a.to(x_ni.dtype).t()


def _low_rank_gradients(
    x_ni: Tensor | None,
    g_nr: Tensor,
    dx_ni: Tensor | None,
    lora_a: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> Tensor | None:
    """Add s drop'(g A) to dx in place, where it is wanted, and return dA = s g^T drop(x), for g = dy B, [N, R].

    Without x there is no dA.
    """
    a_ri = lora_a.to(g_nr.dtype)
    if seed is None:
        if dx_ni is not None:
            dx_ni.addmm_(g_nr, a_ri, alpha=scaling)
        return None if x_ni is None else (g_nr.t() @ x_ni).mul_(scaling)
    scaled_nr = g_nr * scaling  # and not add_(alpha=...): torch's inductor fuses that with dx's product and drops alpha
    if dx_ni is not None:
        dx_ni.add_(seeded_dropout(scaled_nr @ a_ri, p, seed))
    return None if x_ni is None else scaled_nr.t() @ seeded_dropout(x_ni, p, seed)


class LoRALinear(Function):
    """y = x W^T + b + s (drop(x) A^T) B^T (Hu et al. 2021, equation 3).

    Saves x (shared with every layer that reads it), unless A is frozen, and h = drop(x) A^T, R wide. The update is
    accumulated into the output, and into dx, by the matrix product itself, so no extra pass over a token-sized tensor
    is made:
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
    ) -> tuple[Tensor, Tensor]:
        """Return y [N, O] and h [N, R]."""
        dtype = compute_dtype(x)
        x_ni, w_oi = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        h_nr = _project(x_ni, lora_a, p, seed)
        y_no = torch.mm(x_ni, w_oi.t()) if bias is None else torch.addmm(bias.to(dtype), x_ni, w_oi.t())
        y_no.addmm_(h_nr, lora_b.to(dtype).t(), alpha=scaling)
        return y_no, h_nr

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
        """Save x where A trains, the parameters, h and the seed."""
        x, weight, _, lora_a, lora_b, ctx.scaling, ctx.p, seed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, lora_a, lora_b, output[1], seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_no: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of x, A and B."""
        x, weight, lora_a, lora_b, h_nr, seed = ctx.saved_tensors
        x_ni = None if x is None else x.reshape(-1, x.shape[-1]).to(dy_no.dtype)
        g_nr = dy_no @ lora_b.to(dy_no.dtype)
        dx_ni = dy_no @ weight.to(dy_no.dtype) if ctx.needs_input_grad[0] else None
        da_ri = _low_rank_gradients(x_ni, g_nr, dx_ni, lora_a, ctx.scaling, ctx.p, seed)
        db_or = (h_nr.t() @ dy_no).t() * ctx.scaling  # (h^T dy)^T is up to twice as fast as dy^T h
        dx = None if dx_ni is None else dx_ni.view(ctx.x_shape).to(ctx.x_dtype)
        da = None if da_ri is None else da_ri.to(lora_a.dtype)
        return dx, None, None, da, db_or.to(lora_b.dtype), None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
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

    Returns:
        The output, `[..., O]`.

    Example:
        >>> lora_linear(torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1), 0.5)[0]
        tensor([4.5000, 4.5000, 4.5000, 4.5000])
    """
    y_no, _ = LoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling, p, seed)  # type: ignore[no-untyped-call]
    # Out here, since torch forbids in-place operations (a ReLU, a residual add) on a view made inside a Function.
    return y_no.view(*x.shape[:-1], y_no.shape[1])


class DoRALinear(Function):
    """y = c (x W^T + s (drop(x) A^T) B^T) + b with c = m / ‖V‖ per output row (Liu et al. 2024, equation 5).

    The norm is a constant in backward (section 4.3). Saves x, y and h = drop(x) A^T; the magnitude's gradient needs
    nothing else, because y - b = m · V x / ‖V‖:
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
    ) -> tuple[Tensor, Tensor]:
        """Return y [N, O] and h [N, R]."""
        dtype = compute_dtype(x)
        x_ni, w_oi = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        h_nr = _project(x_ni, lora_a, p, seed)
        y_no = torch.mm(x_ni, w_oi.t()).addmm_(h_nr, lora_b.to(dtype).t(), alpha=scaling)
        y_no.mul_((magnitude / norm).to(dtype))
        if bias is not None:
            y_no.add_(bias.to(dtype))
        return y_no, h_nr

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
        """Save x, y, h, the parameters and the seed."""
        x, weight, bias, lora_a, lora_b, magnitude, norm, ctx.scaling, ctx.p, seed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, bias, lora_a, lora_b, magnitude, norm, *output, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_no: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of x, A, B and the magnitude."""
        x, weight, bias, lora_a, lora_b, magnitude, norm, y_no, h_nr, seed = ctx.saved_tensors
        x_ni = x.reshape(-1, x.shape[-1]).to(dy_no.dtype)
        scale_o = (magnitude / norm).to(dy_no.dtype)
        dm_o = (dy_no * y_no).sum(0, dtype=magnitude.dtype)
        if bias is not None:
            dm_o -= dy_no.sum(0, dtype=magnitude.dtype) * bias
        dm_o = torch.where(magnitude == 0, 0, dm_o / magnitude)
        g_nr = dy_no @ (lora_b.to(dy_no.dtype) * scale_o[:, None])
        dx_ni = (dy_no * scale_o) @ weight.to(dy_no.dtype) if ctx.needs_input_grad[0] else None
        da_ri = _low_rank_gradients(x_ni, g_nr, dx_ni, lora_a, ctx.scaling, ctx.p, seed)
        assert da_ri is not None
        db_or = (h_nr.t() @ dy_no).t() * (scale_o[:, None] * ctx.scaling)
        dx = None if dx_ni is None else dx_ni.view(x.shape).to(x.dtype)
        return dx, None, None, da_ri.to(lora_a.dtype), db_or.to(lora_b.dtype), dm_o, None, None, None, None


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

    Returns:
        The output, `[..., O]`.

    Example:
        >>> factors = torch.ones(1, 3), torch.ones(4, 1), torch.full((4,), 2.0), torch.full((4,), 3.0)
        >>> dora_linear(torch.ones(2, 3), torch.ones(4, 3), None, *factors, 0.5)[0]
        tensor([3., 3., 3., 3.])
    """
    y_no, _ = DoRALinear.apply(x, weight, bias, lora_a, lora_b, magnitude, norm, scaling, p, seed)  # type: ignore[no-untyped-call]
    return y_no.view(*x.shape[:-1], y_no.shape[1])


@torch.library.custom_op("lora_lightning::dora_norm", mutates_args=())
def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, base_norm_squared: Tensor) -> Tensor:
    """Compute ‖W + s B A‖ of each row without building B A.

    ‖v_o‖² = ‖w_o‖² + 2 s b_o · (A w_o) + s² b_o (A A^T) b_o^T. Where these terms cancel (‖V‖² below a tenth of their
    sum), the row is built after all, in float64. One opaque operator, so that the branch does not break a graph.

    Args:
        weight: W, `[O, I]`, any floating dtype.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        scaling: The factor s.
        base_norm_squared: ‖w_o‖², `[O]`, computed once.

    Returns:
        The norms, `[O]`, float32 or wider, at least 1e-30.
    """
    with torch.autocast(weight.device.type, enabled=False):
        dtype = torch.promote_types(base_norm_squared.dtype, torch.float32)
        a_ri, b_or = lora_a.to(dtype), lora_b.to(dtype)
        cross_o = 2 * scaling * ((weight.to(dtype) @ a_ri.t()) * b_or).sum(1)
        update_o = scaling**2 * ((b_or @ (a_ri @ a_ri.t())) * b_or).sum(1)
        squared_o = base_norm_squared + cross_o + update_o
        cancelled = squared_o < 0.1 * (base_norm_squared + update_o)
        if bool(cancelled.any()):
            rows = cancelled.nonzero().squeeze(1)
            v_oi = weight[rows].double() + scaling * (lora_b[rows].double() @ lora_a.double())
            squared_o[rows] = v_oi.square().sum(1).to(dtype)
        return squared_o.clamp_min_(0).sqrt_().clamp_min_(_MIN_NORM)


@dora_norm.register_fake
def _(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, base_norm_squared: Tensor) -> Tensor:
    del weight, lora_a, lora_b, scaling
    return torch.empty_like(base_norm_squared, dtype=torch.promote_types(base_norm_squared.dtype, torch.float32))
