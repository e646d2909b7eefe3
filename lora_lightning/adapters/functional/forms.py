"""What the forms of a low-rank layer share: in which dtype to compute, which form pays, the gradients of A and B."""

from __future__ import annotations

import inspect
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from lora_lightning.adapters.functional.dropout import seeded_mask

AnyFunction = TypeVar("AnyFunction", bound=type[Function])


def with_known_signature(function: AnyFunction) -> AnyFunction:
    """Keep the signature of a function's forward, which torch would take 15 µs to find out again at every call."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined] # inspect reads it
    return function


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in: autocast's where it is on, else the input's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def is_exporting() -> bool:
    """Return whether a graph is being made for others (`torch.export`, `torch.onnx.export`, `torch.jit.trace`).

    Such a graph must hold torch's own operators alone, and no choice that one size of the input suggests.
    """
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


class Rebuilt(NamedTuple):
    """In which passes the update is added to the weight, V = W + s B A, and not to what the product gives.

    Args:
        in_forward: y = x V^T.
        in_backward: dx = dy V.
    """

    in_forward: bool
    in_backward: bool


NOT_REBUILT = Rebuilt(in_forward=False, in_backward=False)


def rebuilding_pays(x: Tensor, num_out: int, stored: torch.dtype | None, *, both_or_neither: bool = False) -> Rebuilt:
    """Tell in which passes to rebuild W + s B A for this input.

    Adding the update to the weight touches O · I numbers; adding it to the output, tokens · O, and to the input's
    gradient, tokens · I. In half precision rebuilding would round small updates away, so there it never pays.

    Args:
        x: Input, `[..., I]`.
        num_out: O.
        stored: Dtype in which the host multiplies by its weight; None where it does something else.
        both_or_neither: Whether both passes rebuild or none, as DoRA's do. Rebuilding spares those what norm and
            magnitude cost them, too, so it pays earlier: where tokens · (I + O) > I · O.

    Example:
        >>> rebuilding_pays(torch.ones(8, 128, 384), 1536, torch.float32)
        Rebuilt(in_forward=True, in_backward=False)
        >>> rebuilding_pays(torch.ones(1, 1, 384), 384, torch.float32)
        Rebuilt(in_forward=False, in_backward=False)
    """
    dtype, num_in = compute_dtype(x), x.shape[-1]
    if dtype is not stored or dtype not in (torch.float32, torch.float64):
        return NOT_REBUILT
    num_values = x.numel()
    if both_or_neither:
        pays = num_values * (num_in + num_out) > num_in * num_in * num_out
        return Rebuilt(in_forward=_is_known(pays), in_backward=_is_known(pays))
    in_forward, in_backward = num_values > num_in * num_in, num_values > num_in * num_out
    return Rebuilt(in_forward=_is_known(in_forward), in_backward=_is_known(in_backward))


def _is_known(condition: bool) -> bool:
    """Return a condition on a size; False where compiled code does not know the size, such as the rows of one name."""
    if not torch.compiler.is_dynamo_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def narrow(x_nk: Tensor, m_rk: Tensor) -> Tensor:
    """Return x M^T, [N, R], for few R.

    In float32 and float64 it is computed as (M x^T)^T, which a CPU multiplies up to four times as fast, since the long
    side fills its vector registers; in half precision it would be slower.

    Example:
        >>> narrow(torch.ones(3, 2), torch.tensor([[1.0, 4.0]])).tolist()
        [[5.0], [5.0], [5.0]]
    """
    if x_nk.dtype in (torch.float32, torch.float64):
        return (m_rk @ x_nk.t()).t()
    return x_nk @ m_rk.t()


def project(x_ni: Tensor, lora_a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return h = mask(x) A^T, [N, R], where the mask of dropout is not scaled up: see `update_scale`."""
    masked_ni = x_ni if seed is None else seeded_mask(x_ni, p, seed).mul_(x_ni)
    return narrow(masked_ni, lora_a.to(x_ni.dtype))


def update_scale(scaling: float, p: float, seed: Tensor | None) -> float:
    """Return the factor on mask(x) A^T B^T: s, over 1 - p under dropout, so that no pass over a tensor scales it up."""
    return scaling if seed is None else scaling / (1 - p)


def low_rank_gradients(
    x_ni: Tensor | None,
    g_nr: Tensor,
    dx_ni: Tensor | None,
    lora_a: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> Tensor | None:
    """Add mask(scale · g A) to dx in place where it is wanted, and return dA = scale · g^T mask(x); g = dy B, [N, R].

    Without x there is no dA. One mask serves both.
    """
    a_ri = lora_a.to(g_nr.dtype)
    if seed is None:
        if dx_ni is not None:
            dx_ni.addmm_(g_nr, a_ri, alpha=scale)
        return None if x_ni is None else (g_nr.t() @ x_ni).mul_(scale)
    scaled_nr = g_nr * scale
    update_ni = scaled_nr @ a_ri
    mask_ni = seeded_mask(update_ni, p, seed)
    if dx_ni is not None:
        dx_ni.addcmul_(update_ni, mask_ni)
    return None if x_ni is None else scaled_nr.t() @ mask_ni.mul_(x_ni)
