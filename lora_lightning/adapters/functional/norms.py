"""The norms that DoRA divides by."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.adapters.functional.forms import narrow

MIN_NORM = 1e-30


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
        cross_o = 2 * scaling * (narrow(weight.to(dtype), a_ri) * b_or).sum(1)
        update_o = scaling**2 * ((b_or @ (a_ri @ a_ri.t())) * b_or).sum(1)
        squared_o = base_norm_squared + cross_o + update_o
        cancelled = squared_o < 0.1 * (base_norm_squared + update_o)
        if bool(cancelled.any()):
            rows = cancelled.nonzero().squeeze(1)
            v_oi = weight[rows].double() + scaling * (lora_b[rows].double() @ lora_a.double())
            squared_o[rows] = v_oi.square().sum(1).to(dtype)
        return squared_o.clamp_min_(0).sqrt_().clamp_min_(MIN_NORM)


@dora_norm.register_fake
def _(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, base_norm_squared: Tensor) -> Tensor:
    del weight, lora_a, lora_b, scaling
    return torch.empty_like(base_norm_squared, dtype=torch.promote_types(base_norm_squared.dtype, torch.float32))
