"""The arithmetic of low-rank updates: sums by concatenation, and cuts by an SVD of a small core.

An update is B A with A `[..., rank, in]` and B `[..., out, rank]`; a leading dimension counts experts. Its scaling is
folded into B. The dense update `[..., out, in]` is never built. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A low-rank update B A.

    Args:
        a: A, `[..., rank, in]`, float64.
        b: B, `[..., out, rank]`, float64.
    """

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scaling: float = 1.0) -> Factors:
        """Return the update s B A, on the CPU in float64."""
        wide = (tensor.detach().to(device="cpu", dtype=torch.float64) for tensor in (a, b))
        wide_a, wide_b = wide
        return cls(wide_a, scaling * wide_b)

    @property
    def rank(self) -> int:
        """Rows of A; the numerical rank of B A may be lower."""
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of B A, `[..., out, in]`."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def cost(self) -> int:
        """Number of parameters of one rank: `in + out`, times the number of experts."""
        *experts, num_out, num_in = self.shape
        return (num_out + num_in) * math.prod(experts)

    def times(self, weight: float) -> Factors:
        """Return w B A."""
        return Factors(self.a, weight * self.b)

    def first(self, rank: int) -> Factors:
        """Return the update of the first components alone."""
        return Factors(self.a[..., :rank, :], self.b[..., :rank])

    def dense(self) -> Tensor:
        """Return B A itself, `[..., out, in]`; for what works element by element."""
        return self.b @ self.a


def add(updates: Iterable[Factors]) -> Factors:
    """Return the sum of updates, exactly: [B1, B2, ...] [A1; A2; ...].

    Example:
        >>> one = Factors.of(torch.ones(1, 3), torch.ones(2, 1))
        >>> total = add([one, one.times(2)])
        >>> total.rank, total.dense().tolist()
        (2, [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]])
    """
    parts = list(updates)
    return Factors(torch.cat([part.a for part in parts], -2), torch.cat([part.b for part in parts], -1))


@dataclass(frozen=True)
class Decomposed:
    """The singular value decomposition of an update, B A = U diag(s) V, of which any first ranks are the best cut.

    Args:
        u: U, `[..., out, k]`, with orthonormal columns.
        values: s, `[..., k]`, the largest first.
        v: V, `[..., k, in]`; its rows are orthonormal, unless the decomposition is weighted (`decompose`).
        noise: What rounding may have added to a singular value, `[...]`.
    """

    u: Tensor
    values: Tensor
    v: Tensor
    noise: Tensor

    @property
    def energies(self) -> Tensor:
        """Squares of the singular values, summed over experts, `[k]`, the largest first."""
        squares = self.values.square()
        return squares.reshape(-1, squares.shape[-1]).sum(0)

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the update."""
        return float(self.energies.sum())

    @property
    def rank(self) -> int:
        """Number of singular values above the rounding, at least 1; of experts, the largest."""
        return max(int((self.values > self.noise[..., None]).sum(-1).max()), 1)

    def discarded(self, rank: int) -> float:
        """Return the squared Frobenius norm of what a cut to `rank` takes away."""
        return float(self.energies[rank:].sum())

    def cut(self, rank: int) -> Factors:
        """Return the best update of a rank; both factors take the square root of each singular value.

        Its first components are again the best update of a lower rank.
        """
        root = self.values[..., :rank].sqrt()
        return Factors(root[..., :, None] * self.v[..., :rank, :], self.u[..., :rank] * root[..., None, :])


def decompose(update: Factors, moment: Tensor | None = None) -> Decomposed:
    """Decompose an update by QR of both factors and an SVD of the small core.

    Args:
        update: The update.
        moment: E[h h^T] of the hidden values h = A x over the inputs x that the layer is fed, `[..., rank, rank]`. With
            it the singular values are those of B A E[x x^T]^(1/2), so that a cut is best for the outputs and not for
            the weights. None weighs all inputs alike.

    Returns:
        The decomposition, with at most min(rank, out, in) singular values.
    """
    q_out, core_b = torch.linalg.qr(update.b)
    if moment is not None:
        return _decompose_weighted(update, q_out, core_b, moment)
    q_in, core_a = torch.linalg.qr(update.a.mT)
    core = core_b @ core_a.mT
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    return Decomposed(q_out @ u, values, v @ q_in.mT, _noise(core_b, core_a, update))


def _decompose_weighted(update: Factors, q_out: Tensor, core_b: Tensor, moment: Tensor) -> Decomposed:
    """Decompose B A E[x x^T]^(1/2), and give back an update of the weights: U^T B A takes the place of diag(s) V."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    root = vectors * eigenvalues.clamp_min(0).sqrt()[..., None, :]
    u, values, _ = torch.linalg.svd(core_b @ root, full_matrices=False)
    left = q_out @ u
    rows = (left.mT @ update.b) @ update.a
    noise = _noise(core_b, root, update)
    safe = values.clamp_min(1e-300)
    return Decomposed(left, values, rows / safe[..., None], noise)


def _noise(core_b: Tensor, core_a: Tensor, update: Factors) -> Tensor:
    """Return how far rounding may move a singular value: a multiple of the norms of the factors."""
    norms = torch.linalg.matrix_norm(core_b) * torch.linalg.matrix_norm(core_a)
    return norms * torch.finfo(torch.float64).eps * max(update.shape[-2:])


def energy(update: Factors) -> float:
    """Return the squared Frobenius norm of an update, by the traces of its small products."""
    gram = (update.b.mT @ update.b) * (update.a @ update.a.mT)
    return max(float(gram.sum()), 0.0)


def distance_squared(one: Factors, other: Factors) -> float:
    """Return the squared Frobenius norm of a difference; exact where the two nearly agree, unlike by `energy`."""
    return decompose(add([one, other.times(-1)])).energy


def decompose_dense(update: Tensor) -> Decomposed:
    """Decompose a dense update, `[..., out, in]`."""
    u, values, v = torch.linalg.svd(update.double(), full_matrices=False)
    noise = torch.linalg.matrix_norm(update.double()) * torch.finfo(torch.float64).eps * max(update.shape[-2:])
    return Decomposed(u, values, v, noise)
