"""Compute a merge in float32, and cast once at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_lightning.errors import CheckpointError

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
def widen(model: nn.Module) -> None:
    """Turn all half-precision tensors of a model into float32, in place."""
    for _, tensor in [*_parameters(model), *_buffers(model)]:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()


@torch.no_grad()
def round_to(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round the parameters of a widened model to what their final dtypes can hold; they stay as wide as they are.

    Raises:
        CheckpointError: A value is too large for its dtype.
    """
    for name, parameter in _parameters(model):
        dtype = dtypes[name]
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        if dtype is torch.float16 and not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(
                f"{name!r} has values that float16 cannot hold (above 65,504); write bfloat16 or float32."
            )


@torch.no_grad()
def narrow(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast every tensor of a rounded model to its final dtype, in place."""
    for name, tensor in [*_parameters(model), *_buffers(model)]:
        tensor.data = tensor.data.to(dtypes[name])


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
