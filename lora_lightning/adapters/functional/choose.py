"""Which form of a low-rank layer is the cheapest for an input, and the layer in that form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_lightning.adapters.functional.dora import dora_linear, rebuilt_dora_linear
from lora_lightning.adapters.functional.forms import NOT_REBUILT, Rebuilt, rebuilding_pays
from lora_lightning.adapters.functional.lora import Read, lora_linear
from lora_lightning.adapters.functional.recompute import Source, find_source
from lora_lightning.adapters.weights import Host, codec_of


class Form(NamedTuple):
    """The frozen part of a linear host, in the form that an input asks for.

    Args:
        weight: W, `[O, I]`, or what reads it out of its storage (only where it is rebuilt).
        bias: b, `[O]`, or None.
        rebuilt: In which passes the update goes into the weight instead of the outcome.
        source: What backward keeps instead of the input; None to keep the input.
    """

    weight: Tensor | Read
    bias: Tensor | None
    rebuilt: Rebuilt
    source: Source | None


def choose_form(
    host: Host, x: Tensor, *, may_rebuild: bool, recompute: bool, both_or_neither: bool = False
) -> Form | None:
    """Choose the form of a linear host's layer; None where the host has to multiply by its packed weight itself.

    Args:
        host: The host, linear.
        x: Its input, `[..., I]`.
        may_rebuild: Whether W + s B A may take the place of W: not under dropout, which acts on the input of A alone.
        recompute: Whether backward may compute the input again, where that came out of an activation or a product.
        both_or_neither: Whether both passes rebuild the weight or neither: see `rebuilding_pays`.
    """
    codec, source = codec_of(host), find_source(x) if recompute else None
    if may_rebuild and (codec.is_view or not torch.compiler.is_compiling()):
        num_out, _ = codec.shape(host)
        rebuilt = rebuilding_pays(x, num_out, codec.product_dtype(host, x.dtype), both_or_neither=both_or_neither)
        if any(rebuilt):
            weight = codec.read(host) if codec.is_view else lambda: codec.read(host).to(x.dtype)
            return Form(weight, host.bias, rebuilt, source)
    return Form(codec.read(host), host.bias, NOT_REBUILT, source) if codec.is_view else None


def adapted_linear(
    x: Tensor, form: Form, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float, seed: Tensor | None
) -> Tensor:
    """Compute x W^T + b + s (drop(x) A^T) B^T in the form chosen.

    Args:
        x: Input, `[..., I]`.
        form: As `choose_form` returns it.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        scaling: The factor s.
        p: Dropout probability on the input of A.
        seed: Dropout seed; None turns dropout off.

    Returns:
        The output, `[..., O]`.
    """
    weight, bias, rebuilt, source = form
    return lora_linear(x, weight, bias, lora_a, lora_b, scaling, p, seed, source, rebuilt)


def adapted_dora_linear(
    x: Tensor,
    form: Form,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    norm: Callable[[], Tensor],
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """Compute c (x W^T + s (drop(x) A^T) B^T) + b with c = m / ‖W + s B A‖ in the form chosen.

    Args:
        x: Input, `[..., I]`.
        form: As `choose_form` returns it.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        magnitude: m, `[O]`.
        norm: Returns ‖W + s B A‖ of each row, `[O]`; not called where the weight is rebuilt.
        scaling: The factor s.
        p: Dropout probability on the input of A.
        seed: Dropout seed; None turns dropout off.

    Returns:
        The output, `[..., O]`.
    """
    weight, bias, rebuilt, source = form
    if any(rebuilt):
        return rebuilt_dora_linear(x, weight, bias, lora_a, lora_b, magnitude, scaling, source)
    assert isinstance(weight, Tensor)
    return dora_linear(x, weight, bias, lora_a, lora_b, magnitude, norm(), scaling, p, seed, source)
