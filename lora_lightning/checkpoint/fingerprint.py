"""A digest of the base weights under the adapters, to detect an adapter on a base that it was not trained on."""

from __future__ import annotations

import hashlib
import warnings

from torch import nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.base import Role
from lora_lightning.adapters.experts import expert_weights
from lora_lightning.adapters.targets import is_within
from lora_lightning.adapters.walk import join
from lora_lightning.adapters.weights import RESERVED, find_codec, original_class
from lora_lightning.backbones.storage.samples import host_samples
from lora_lightning.checkpoint.base_sample import (
    BaseSample,
    base_sample_of,
    keep_base_sample,
    why_another_base,
    without_trained_rows,
)
from lora_lightning.errors import CheckpointError


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the frozen weights under the adapters of a model.

    The digest covers, for every host in the order of its path: the path, the shape of its dense weight, and 1,024
    evenly strided values of it (all of them in a smaller weight) as float32; of a module of experts, each 3-D
    parameter. It does not depend on the device, nor on whether adapters are enabled, nor on the dtype as long as the
    values survive the cast to float32. A base that `load_backbone` quantized has the fingerprint of the dense one,
    since the values are those before quantization; a base that was quantized elsewhere has another fingerprint, and
    `check_base` compares its values. Rows of an embedding that are trained individually do not count, nor do modules
    that are trained as full copies (heads): the copy replaces their initial values.

    Args:
        model: A model with adapters attached.

    Returns:
        64 hexadecimal digits.
    """
    digest, sampled = hashlib.sha256(), BaseSample()
    for path, host in sorted(_hosts(model).items()):
        for name, (shape, values, are_original) in host_samples(host).items():
            own = without_trained_rows(host, shape, values)
            digest.update(f"{join(path, name)}\0{shape}\0".encode())
            digest.update(b"" if are_original else b"quantized\0")
            digest.update(own.numpy().astype("<f4", copy=False).tobytes())
            sampled.add(join(path, name), own, None if are_original else _bits(host))
    keep_base_sample(model, sampled)
    return digest.hexdigest()


def check_fingerprint(found: str, expected: str, source: str) -> None:
    """Refuse a base model that differs from the one an adapter was trained on.

    Args:
        found: The fingerprint of the model at hand.
        expected: The fingerprint that was stored with the adapter.
        source: Name of the checkpoint or folder, for the message.

    Raises:
        CheckpointError: The fingerprints differ.
    """
    if found != expected:
        raise CheckpointError(
            f"{source} was trained on another base model: the base weights under its adapters have fingerprint "
            f"{expected[:12]}…, those of this model have {found[:12]}…. Load the base that it was trained on "
            "(the manifest beside the checkpoint names it), in the same precision."
        )


def check_base(
    model: nn.Module, expected: str | None, theirs: BaseSample | None, source: str, *, found: str | None = None
) -> None:
    """Refuse a base model that differs from the one an adapter was trained on.

    If one of the two was quantized before this library loaded it, their values are compared within the quantization
    error, by the sample in the adapter folder or checkpoint.

    Args:
        model: The model at hand, with the adapters attached.
        expected: The fingerprint that was stored with the adapter; None if it was computed from others without a base:
            then the values are compared, as far as there are some.
        theirs: The sample that was stored with it; None in a folder of an older version.
        source: Name of the checkpoint or folder, for the message.
        found: The model's fingerprint, if known: it cannot be computed for a sharded base.

    Raises:
        CheckpointError: The bases differ.
    """
    found = found or fingerprint(model)
    mine = base_sample_of(model)
    if expected is None:
        if mine is not None and theirs is not None:  # of some layers there may be no values
            _check_values(mine.of(theirs.values), theirs, source)
        return
    if found == expected or mine is None or not (mine.is_quantized or (theirs is not None and theirs.is_quantized)):
        check_fingerprint(found, expected, source)
        return
    if theirs is None:
        warnings.warn(
            f"The base of {source} was not compared with this model's, which was quantized before this library saw its "
            "weights: the folder is of an older version, which kept no values to compare.",
            stacklevel=3,
        )
        return
    _check_values(mine, theirs, source)


def _check_values(mine: BaseSample, theirs: BaseSample, source: str) -> None:
    """Refuse a base whose values differ from those of an adapter's base.

    Raises:
        CheckpointError: They differ.
    """
    reason = why_another_base(mine, theirs)
    if reason is not None:
        raise CheckpointError(
            f"{source} was trained on another base model: {reason}. Load the base that it was trained on (the manifest "
            "beside the checkpoint names it)."
        )


def _hosts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose weight stays in use, by path: hosts, and the layers of hosts without a weight."""
    found = [
        (path, host, {role for _, _, role in adapter.named_roles()}) for path, host, adapter in iter_adapters(model)
    ]
    copied = [path for path, _, roles in found if roles == {Role.HEAD}]
    hosts: dict[str, nn.Module] = {}
    for path, host, roles in found:
        if roles == {Role.HEAD}:
            continue
        inside = {path: host} if _has_weight(host) else _layers(path, host)
        hosts |= {name: layer for name, layer in inside.items() if name == path or not is_within(name, copied)}
    return hosts


def _bits(host: nn.Module) -> int:
    """Return how many bits a quantized host stores a value in."""
    return 8 if original_class(host).__name__ == "Linear8bitLt" else 4


def _layers(path: str, host: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a dense weight below a host, by path."""
    return {
        join(path, name): module
        for name, module in host.named_modules()
        if RESERVED not in name.split(".") and _has_weight(module)
    }


def _has_weight(module: nn.Module) -> bool:
    return find_codec(module) is not None or bool(expert_weights(module))
