"""Short digests of tensors: of a sample, to recognize a frozen weight, and of all values, to notice a change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lightning.backbones.storage.samples import sample_positions

_MANY = 1 << 20
"""Up to so many values, a checksum covers the bytes of each one."""


def sample_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, shapes and up to 1,024 values of each tensor, compared as float32.

    It depends neither on the device nor on a dtype in which the values survive.

    Example:
        >>> sample_digest({"w": torch.ones(3)}) == sample_digest({"w": torch.ones(3, dtype=torch.float64)})
        True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(_some_values(tensor)))
    return digest.hexdigest()[:16]


def checksum(tensor: Tensor) -> str:
    """Return a checksum that changes with any value of a tensor of up to a million, and in practice of a larger one.

    Of a larger one it covers the bytes of a million evenly strided values, and the sum of all.

    Example:
        >>> checksum(torch.tensor([1, 2])) == checksum(torch.tensor([2, 1]))
        False
    """
    if tensor.is_meta:
        return "meta"
    flat = tensor.detach().reshape(-1)
    digest = hashlib.blake2b(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode(), digest_size=8)
    if flat.numel() <= _MANY:
        digest.update(_bytes(flat))
    else:
        stride = flat.numel() // _MANY
        digest.update(_bytes(flat[::stride]))
        digest.update(_bytes(_real(flat).double().sum().reshape(1)))
    return digest.hexdigest()


def _some_values(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return torch.empty(0)
    flat = tensor.detach().reshape(-1)
    positions = sample_positions(flat.numel()).to(flat.device)
    return _real(flat[positions]).float()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _bytes(tensor: Tensor) -> bytes:
    on_host = _real(tensor).cpu().contiguous()
    return on_host.view(torch.uint8).numpy().tobytes() if on_host.numel() else b""
