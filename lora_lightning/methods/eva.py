"""EVA: A starts at the main directions of the data that a host sees (Paischer et al. 2024, arXiv 2410.07170)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.methods.low_rank import LowRankAdapter

NUM_BATCHES = 8
"""Batches that EVA looks at."""


class MainDirections:
    """The main right singular vectors of a matrix whose rows come in batches, by a truncated incremental SVD.

    Twice the wanted directions are carried along, so that one that grows late is not lost; as long as no more than
    these are needed to describe the rows seen so far, the result is exact.

    Args:
        num: Number of directions wanted.

    Attributes:
        rows: Singular values times right singular vectors, `[at most 2 num, in]`, the largest first; None at first.
    """

    def __init__(self, num: int) -> None:
        self.num = num
        self.rows: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in rows, `[..., in]`."""
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        together = rows if self.rows is None else torch.cat([self.rows, rows])
        _, values, vectors = torch.linalg.svd(together, full_matrices=False)
        self.rows = (values[:, None] * vectors)[: 2 * self.num]

    def directions(self) -> Tensor:
        """Return the orthonormal directions, `[at most num, in]`; those that the rows do not have are left out."""
        assert self.rows is not None
        values = torch.linalg.vector_norm(self.rows, dim=1)
        present = values > values.max() * torch.finfo(values.dtype).eps * max(self.rows.shape)
        return (self.rows / values.clamp_min(1e-30)[:, None])[present][: self.num]


@torch.no_grad()
def start_from_data(
    model: nn.Module,
    adapters: Mapping[str, LowRankAdapter],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
) -> None:
    """Set each A to the main directions of its host's inputs, in place; B stays zero.

    Where the inputs have fewer directions than the rank, the other rows of A stay as drawn.

    Args:
        model: The adapted model; run in evaluation mode, and given its modes back.
        adapters: Adapters of linear hosts by path.
        batches: Batches to look at; the first few are taken, and nothing is kept of them.
        loss: Runs the model on a batch.

    Raises:
        DataError: There is no batch.
        ConfigError: A host was not called, or its inputs are not finite.
    """
    found = {path: MainDirections(adapter.r) for path, adapter in adapters.items()}
    num_batches = 0
    with _evaluating(model), _watched(adapters, found):
        for batch in islice(batches, NUM_BATCHES):
            loss(batch)
            num_batches += 1
    if num_batches == 0:
        raise DataError("init='eva' looks at training data, and there is no batch; check the data module.")
    for path, adapter in adapters.items():
        if found[path].rows is None:
            raise ConfigError(f"init='eva' needs the inputs of {path!r}, and the model did not call it; leave it out.")
        _gather(found[path])
        directions = found[path].directions()
        adapter.lora_A[: len(directions)] = directions.to(adapter.lora_A)


@contextmanager
def _watched(adapters: Mapping[str, LowRankAdapter], found: Mapping[str, MainDirections]) -> Iterator[None]:
    """Hand the inputs of every host to its collector."""

    def watch(path: str, args: tuple[Any, ...]) -> None:
        x: Tensor = args[1]  # after the host
        if not torch.isfinite(x).all():
            raise ConfigError(f"init='eva': the inputs of {path!r} are not finite; look for a fault in data or base.")
        found[path].add(x)

    handles = [
        adapter.register_forward_pre_hook(lambda _, args, path=path: watch(path, args))
        for path, adapter in adapters.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, and give every module its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _gather(found: MainDirections) -> None:
    """Bring what all ranks saw together, so that they start from the same A."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    assert found.rows is not None
    padded = found.rows.new_zeros(2 * found.num, found.rows.shape[1])  # ranks may have seen fewer rows than that
    padded[: len(found.rows)] = found.rows
    every = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(every, padded)
    found.rows = None
    found.add(torch.cat(every))
