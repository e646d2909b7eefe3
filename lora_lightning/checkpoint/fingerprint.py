"""A short digest of the base weights under the adapters, to notice an adapter on a base it was not trained on."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.base import Role
from lora_lightning.adapters.weights import find_codec, read_weight
from lora_lightning.errors import CheckpointError

SAMPLES = 1024


def fingerprint(model: nn.Module) -> str:
    """Digest the frozen weights that the adapters of a model stand on.

    The digest covers, for every host in the order of its path: the path, the shape of its dense weight, and 1,024
    evenly strided values of it (all of them in a smaller weight) as float32. It does not depend on the device, nor on
    whether adapters are enabled, nor on the dtype as long as the values survive the cast to float32. A module that is
    trained as a full copy (a head) does not count: its own starting values are replaced by the copy.

    Args:
        model: A model with adapters attached.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path, host in sorted(_hosts(model).items()):
        weight = read_weight(host)
        values = sample(weight)
        digest.update(f"{path}\0{tuple(weight.shape)}\0".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def sample(weight: Tensor) -> Tensor:
    """Pick up to 1,024 evenly strided values of a weight, in row order and without copying the rest.

    Args:
        weight: Any floating-point tensor of two dimensions, shape `[out, in]`, contiguous or not.

    Returns:
        The values as float32 on the CPU, shape `[min(1024, out * in)]`; the first and the last are always among them.

    Example:
        >>> sample(torch.arange(6.0).reshape(2, 3))
        tensor([0., 1., 2., 3., 4., 5.])
    """
    total, columns = weight.numel(), weight.shape[1]
    count = min(SAMPLES, total)
    steps = torch.arange(count, device=weight.device)
    positions = steps * (total - 1) // max(count - 1, 1)
    return weight.detach()[positions // columns, positions % columns].float().cpu()


def check_fingerprint(found: str, expected: str, source: str) -> None:
    """Refuse a base model that differs from the one an adapter was trained on.

    Args:
        found: The fingerprint of the model at hand.
        expected: The fingerprint that was stored with the adapter.
        source: What is being loaded, for the message.

    Raises:
        CheckpointError: The fingerprints differ.
    """
    if found != expected:
        raise CheckpointError(
            f"{source} was trained on another base model: the base weights under its adapters have fingerprint "
            f"{expected[:12]}…, those of this model have {found[:12]}…. Load the base that it was trained on "
            "(the manifest beside the checkpoint names it), in the same precision."
        )


def _hosts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the hosts whose own weight stays in use, by path."""
    hosts = {}
    for path, host, adapter in iter_adapters(model):
        roles = {role for _, _, role in adapter.named_roles()}
        if roles != {Role.HEAD} and find_codec(host) is not None:
            hosts[path] = host
    return hosts
