"""What a layer is fed, as far as its update sees it: second moments of A x over given data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters import iter_adapters
from lora_lightning.arithmetic.adapter import LowRankAdapters
from lora_lightning.arithmetic.reading import read_adapter
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.methods.low_rank import LowRankAdapter

__all__ = ["input_moments"]


@torch.no_grad()
def input_moments(
    model: nn.Module, adapter_dir: str | Path, batches: Iterable[Any], call: Callable[[Any], Any]
) -> dict[str, Tensor]:
    """Return E[h h^T] of the hidden values h = A x of each layer of an adapter, over given data.

    This is all of the inputs' covariance that an error of the outputs needs: ‖B h - B' h'‖² depends on x by it alone.
    So no `[in, in]` matrix is built. Every position counts, padding included.

    Args:
        model: A model on which the adapter is loaded; put it into evaluation mode first.
        adapter_dir: The adapter's folder or `.ckpt`, as `shrink` takes it.
        batches: Batches to look at.
        call: Calls the model on a batch.

    Returns:
        `[rank, rank]` by the layers' paths, float64; for `shrink(moments=...)`.

    Raises:
        ConfigError: A layer is neither linear nor an embedding, is not adapted in the model, or was never called.
        DataError: There is no batch.
    """
    adapter = read_adapter(adapter_dir)
    watchers = {
        path: _Watcher(adapter.layers[path].factors.a, is_embedding=adapter.layers[path].is_embedding)
        for path in adapter.layers
    }
    attached = _adapters_of(model, adapter)
    handles = [attached[path].register_forward_pre_hook(watcher) for path, watcher in watchers.items()]
    num_batches = 0
    try:
        for batch in batches:
            call(batch)
            num_batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not num_batches:
        raise DataError("There is no batch to weigh the layers by; check the data.")
    silent = [path for path, watcher in watchers.items() if not watcher.count]
    if silent:
        raise ConfigError(f"The model did not call {silent[0]!r} on the data, so its inputs cannot weigh it.")
    return {path: watcher.total / watcher.count for path, watcher in watchers.items()}


class _Watcher:
    """A hook that sums h h^T of what an adapter is fed.

    Args:
        factor: A, `[rank, in]`.
        is_embedding: Whether the inputs are token ids.
    """

    def __init__(self, factor: Tensor, *, is_embedding: bool) -> None:
        self.factor, self.is_embedding, self.count = factor, is_embedding, 0
        self.total = torch.zeros(len(factor), len(factor), dtype=torch.float64)

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[1].detach().cpu()  # after the host
        hidden = self.factor.T[x.flatten()] if self.is_embedding else F.linear(x.double().flatten(0, -2), self.factor)
        self.total += hidden.T @ hidden
        self.count += len(hidden)


def _adapters_of(model: nn.Module, adapter: LowRankAdapters) -> dict[str, LowRankAdapter]:
    """Return the model's adapters of the layers.

    Raises:
        ConfigError: One is missing, or is on a layer of another kind.
    """
    attached = {path: one for path, _, one in iter_adapters(model) if isinstance(one, LowRankAdapter)}
    for path, layer in adapter.layers.items():
        if layer.kernel or layer.is_parameter:
            raise ConfigError(
                f"{path!r} is neither a linear layer nor an embedding, so inputs cannot weigh its ranks; shrink "
                "without data."
            )
        if path not in attached:
            raise ConfigError(f"{path!r} of {adapter.source} is not adapted in this model; load the adapter first.")
    return {path: attached[path] for path in adapter.layers}
