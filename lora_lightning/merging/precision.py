"""Compute a merge in float32, and cast once at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_hosts
from lora_lightning.adapters.targets import is_within
from lora_lightning.adapters.weights import overwrite
from lora_lightning.errors import CheckpointError
from lora_lightning.merging.spool import Spool

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name; None stays None.

    Raises:
        CheckpointError: There is no such dtype.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def final_dtypes(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype in which each floating-point tensor of a model is to be written.

    Args:
        model: The model, as it was loaded.
        dtype: For all parameters; None keeps each in its own. Buffers keep theirs always.

    Returns:
        Name -> dtype, a tied parameter under each of its names.
    """
    chosen = {name: dtype or one.dtype for name, one in _parameters(model)}
    return {**{name: one.dtype for name, one in _buffers(model)}, **chosen}


@torch.no_grad()
def widen(model: nn.Module, dtypes: Mapping[str, torch.dtype], spool: Spool) -> None:
    """Turn all half-precision tensors of a model into float32, in place.

    They are stored in files, and so are all other tensors that will change: writing to weights that are mapped from the
    files of the base would copy them into memory.

    Args:
        model: A model with adapters.
        dtypes: What `final_dtypes` returned.
        spool: Stores the tensors in files.
    """
    hosts = [path for path, _ in iter_hosts(model)]
    done: set[int] = set()
    for name, tensor in [*_parameters(model), *_buffers(model)]:
        is_half = tensor.dtype in (torch.float16, torch.bfloat16)
        changes = is_within(name, hosts) or tensor.dtype != dtypes[name]
        if (is_half or changes) and id(tensor) not in done:
            tensor.data = spool.put(tensor.data, torch.float32 if is_half else tensor.dtype)
            done.add(id(tensor))


@torch.no_grad()
def round_to(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round the parameters of a float32 model to values of their final dtypes; their dtype does not change.

    Raises:
        CheckpointError: A value is too large for its dtype.
    """
    for name, parameter in _parameters(model):
        dtype = dtypes[name]
        if dtype == parameter.dtype:
            continue
        overwrite(parameter, parameter.to(dtype))
        if dtype is torch.float16 and not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(
                f"{name!r} has values that float16 cannot hold (above 65,504); write bfloat16 or float32."
            )


@torch.no_grad()
def narrow(model: nn.Module, dtypes: Mapping[str, torch.dtype], spool: Spool) -> None:
    """Cast every tensor of a rounded model to its final dtype, in place; cast tensors are stored in files."""
    for name, tensor in [*_parameters(model), *_buffers(model)]:
        if tensor.dtype != dtypes[name]:
            tensor.data = spool.put(tensor.data, dtypes[name])


def name_of(dtypes: Mapping[str, torch.dtype]) -> str:
    """Return the dtype that most weights have, such as `bfloat16`."""
    values = list(dtypes.values()) or [torch.float32]
    return str(max(set(values), key=values.count)).removeprefix("torch.")


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if tensor.is_floating_point():
            yield name, tensor


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.named_buffers(remove_duplicate=False):
        if tensor.is_floating_point():
            yield name, tensor
