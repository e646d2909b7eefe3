"""Inputs that backward can compute again from tensors that autograd keeps anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Source(NamedTuple):
    """What an input is computed from.

    Args:
        compute: Takes the tensors and returns the input.
        tensors: Tensors that autograd keeps for the operation that made the input.
    """

    compute: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def find_source(x: Tensor) -> Source | None:
    """Return what a layer's input came out of, where that is a GELU, a SiLU or a product, else None.

    So it is for the down projection in a transformer's feed-forward network. Autograd holds what went in anyway: a
    layer that keeps that once more, and computes its input again in backward, frees the input. None under
    `torch.compile`, which finds such trades by itself, and under torch's own checkpointing and offloading, where the
    tensors kept are elsewhere.
    """
    if torch.compiler.is_compiling() or _are_kept_elsewhere():
        return None
    node: Any = x.grad_fn
    operation = type(node).__name__
    if operation == "GeluBackward0":
        approximate = node._saved_approximate
        return Source(lambda z: F.gelu(z, approximate=approximate), (node._saved_self,))
    if operation == "SiluBackward0":
        return Source(F.silu, (node._saved_self,))
    if operation == "MulBackward0" and node._saved_self is not None and node._saved_other is not None:
        return Source(torch.mul, (node._saved_self, node._saved_other))
    return None


def _are_kept_elsewhere() -> bool:
    """Return whether hooks of torch (checkpointing, offloading) take what autograd keeps."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and str(getattr(hooks[0], "__module__", "")).startswith("torch.")
