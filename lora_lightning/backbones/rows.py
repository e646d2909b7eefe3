"""The public `per_row`: like that of `adapters`, and it refuses what a transformers model would compute wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lora_lightning import adapters
from lora_lightning.adapters import disabled, iter_adapters
from lora_lightning.adapters.walk import RECORD, Attachment, unwrap
from lora_lightning.backbones.trials.row_layout import find_shared, has_batch_second
from lora_lightning.errors import ConfigError

__all__ = ["per_row"]

_CAPACITY = "expert_capacity"


@contextmanager
def per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Let each row of a batch have the adapter of its own name inside the `with` block.

    The base computes all rows together, and each adapter its part on its own rows; forward, gradients and `generate`
    (with a cache, sampling or beams, which have the adapter of their row) are those of each row under its adapter
    alone. Every method can be mixed with every other, heads of the same width too. What `disabled` says about threads,
    asyncio tasks and checkpointing holds here too.

    The first time that adapters are mixed, a transformers model is called with a few tokens, to see which of its
    modules get the rows of a batch each on its own.

    Args:
        model: A model with adapters.
        names: For each row the name of its adapter; None for the base.

    Raises:
        ConfigError: No adapter has a name, no name is given, or adapters cannot be mixed in this model: a host
            is called once for all rows, experts have a limited capacity for the whole batch, or a loss for the balance
            of experts is computed over it.

    Example:
        >>> from torch import ones
        >>> from lora_lightning import LoRA, attach
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("de", "fr"):
        ...     report = attach(model, LoRA(r=1), name=name)
        >>> with per_row(model, ["de", None, "fr", "de"]):
        ...     output = model(ones(4, 4))
    """
    base = unwrap(model)
    _refuse_batchwise(base)
    _refuse_shared(base, {name for name in names if name is not None})
    with adapters.per_row(model, names):
        yield


def _refuse_batchwise(model: nn.Module) -> None:
    """Raise ConfigError where rows of a batch compete, or a loss is computed over all of them."""
    configs = {id(config): config for config in (one.__dict__.get("config") for one in model.modules())}.values()
    if any(getattr(config, _CAPACITY, None) is not None for config in configs):
        raise ConfigError(
            f"per_row: the experts of this {type(model).__name__} have a capacity for the whole batch ({_CAPACITY}), "
            "so rows would change each other; give each adapter batches of its own, inside active(model, name)."
        )
    if model.training and any(getattr(config, "output_router_logits", False) for config in configs):
        raise ConfigError(
            "per_row: the loss for the balance of experts (output_router_logits) is computed over all rows of a batch, "
            "whatever their adapters; turn it off in the model's config, or train each adapter on batches of its own."
        )


def _refuse_shared(model: nn.Module, names: set[str]) -> None:
    """Raise ConfigError where an adapter's host is not called with the rows of a batch in its first dimension."""
    paths = {path: adapter.name for path, _, adapter in iter_adapters(model) if adapter.name in names}
    record: Attachment | None = model.__dict__.get(RECORD)
    known = {} if record is None else record.sees_rows
    new = [path for path in paths if path not in known]
    if new:
        shared = _shared(model, new)
        known.update({path: path not in shared for path in new})
    found = next((path for path in paths if not known[path]), None)
    if found is not None:
        raise ConfigError(
            f"The adapter {paths[found]!r} cannot act on some rows of a batch: {found!r} is called with something else "
            "than one entry for each row in its first dimension (all rows share it, or the length comes first). Leave "
            "it out of the targets, or give the adapter batches of its own, inside active(model, name)."
        )


def _shared(model: nn.Module, paths: Sequence[str]) -> frozenset[str]:
    """Return which hosts are known not to see rows; a transformers model is called for it."""
    batch_second = frozenset(path for path in paths if has_batch_second(model, path))
    if not (hasattr(model, "config") and hasattr(model, "get_input_embeddings")):
        return batch_second
    with disabled(model):
        return batch_second | find_shared(model, paths)
