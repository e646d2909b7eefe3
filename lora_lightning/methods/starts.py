"""Starts of A and B that are read off the host's weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def principal_part(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B with s B A the best rank-r approximation of a matrix (PiSSA, arXiv 2404.02948, section 3).

    Args:
        weight: `[out, in]`, float32 or float64.
        r: Rank, at most the smaller side.
        scaling: The factor s.

    Returns:
        A `[r, in]` and B `[out, r]`; each takes the square root of the singular values over s.

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> a, b = principal_part(weight, r=2, scaling=4.0)
        >>> (4 * b @ a).diagonal().round(decimals=3).tolist()
        [3.0, 2.0, 0.0]
    """
    u, singular, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (singular[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def orthonormal_part(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the first r rows of R and columns of Q of a matrix Q R (OLoRA, arXiv 2406.01775).

    Args:
        weight: `[out, in]`, float32 or float64.
        r: Rank, at most the smaller side.
        scaling: The factor s; not used, as in the paper, so that B's columns stay orthonormal.

    Returns:
        A `[r, in]` and B `[out, r]`.

    Example:
        >>> _, b = orthonormal_part(torch.randn(6, 5), r=2, scaling=4.0)
        >>> torch.allclose(b.t() @ b, torch.eye(2), atol=1e-6)
        True
    """
    del scaling
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


WEIGHT_STARTS: Mapping[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": principal_part,
    "olora": orthonormal_part,
}
"""The starts that are parts of the weight itself: what they start at is taken out of the base again."""
