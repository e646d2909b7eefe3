"""Read and write the dense weight of a host, whatever its class stores; other layers register codecs here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_lightning.errors import PackedHost, TargetError

RESERVED = "_lora_lightning"
"""The one child name under which a host keeps its adapters."""


Host: TypeAlias = Any
"""A module whose attributes are those of its own class, which type checkers cannot know."""


class HostKind(StrEnum):
    """How a host uses its weight."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONV = "convolution"


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How to treat one class of host; weights are `[out, in]` as in `nn.Linear`.

    An embedding counts as a linear layer on one-hot vectors (`out` is the embedding width, `in` the vocabulary), a
    convolution as one on patches (`in` is `in_channels / groups` times the kernel's size).

    Args:
        kind: How the host uses its weight.
        shape: Host -> `(out, in)`.
        read: Host -> its weight `[out, in]`, a view where the host stores a dense one.
        write: Takes the host and a new weight `[out, in]`, cast once to the host's own dtype; None where the storage
            is quantized, so that rounding would swallow an update.
        is_view: Whether `read` costs nothing, because the host stores a dense weight.
        product_dtype: Host and dtype of its input -> dtype in which its forward multiplies by what `read` returns; None
            where it does something else.
    """

    kind: HostKind
    shape: Callable[[Host], tuple[int, int]]
    read: Callable[[Host], Tensor]
    write: Callable[[Host, Tensor], None] | None
    is_view: bool = True
    product_dtype: Callable[[Host, torch.dtype], torch.dtype | None] = lambda host, _: host.weight.dtype


_CODECS: dict[str, Codec] = {}


def register_codec(class_name: str, codec: Codec) -> None:
    """Register how hosts of one class are read and written.

    Args:
        class_name: The class as `module.QualifiedName`, so that registering imports nothing.
        codec: How to treat it.
    """
    _CODECS[class_name] = codec


def original_class(host: Host) -> type[Any]:
    """Return the class that a host had before it was adapted."""
    stack = host._modules.get(RESERVED)
    return type(host) if stack is None else stack.host_class


def find_codec(host: Host) -> Codec | None:
    """Return the codec of a host, or None where its class, or an override of `forward`, is unknown.

    None, too, where the weight is no parameter but computed from others, as under weight norm and pruning: what is
    written to it would be lost.
    """
    if host._parameters.get("weight") is None:
        return None
    cls: Any = original_class(host)
    for ancestor in cls.__mro__:
        codec = _CODECS.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if codec is not None:
            scaled = codec.kind is HostKind.EMBEDDING and hasattr(host, "embed_scale")
            return codec if scaled or cls.forward is ancestor.forward else None
    return None


def codec_of(host: nn.Module) -> Codec:
    """Return the codec of a host.

    Raises:
        TargetError: The host is of a class that no codec is registered for.
    """
    codec = find_codec(host)
    if codec is None:
        raise TargetError(
            f"{original_class(host).__name__} is no layer that adapters know how to read; "
            "supported are Linear, Conv1D, Embedding, Conv1d, Conv2d and their 4-bit and 8-bit forms."
        )
    return codec


def read_weight(host: nn.Module) -> Tensor:
    """Return a host's dense weight, shape `[out, in]` for every kind of host.

    Raises:
        TargetError: The host is of an unknown class.

    Example:
        >>> read_weight(nn.Embedding(100, 16)).shape
        torch.Size([16, 100])
    """
    return codec_of(host).read(host)


def write_weight(host: nn.Module, weight: Tensor) -> None:
    """Write a dense weight `[out, in]` into a host, cast once to the host's own dtype.

    Raises:
        TargetError: The host is of an unknown class.
        PackedHost: The host stores its weight quantized.
    """
    check_writable(host)
    write = codec_of(host).write
    assert write is not None
    write(host, weight)


def check_writable(host: nn.Module) -> None:
    """Raise PackedHost where a host stores its weight quantized."""
    if codec_of(host).write is None:
        raise PackedHost(
            f"{original_class(host).__name__} stores its weight quantized, and rounding would swallow the update; "
            "merge into the base in its full precision instead."
        )


@torch.no_grad()
def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Write values into a tensor, cast to its dtype, so that torch counts the write.

    What is kept of a weight (DoRA's norm) follows its version, which a write through `.data` leaves as it is.
    """
    tensor.copy_(values)


register_codec(
    "torch.nn.modules.linear.Linear",
    Codec(
        kind=HostKind.LINEAR,
        shape=lambda host: (host.out_features, host.in_features),
        read=lambda host: host.weight,
        write=lambda host, weight: overwrite(host.weight, weight),
    ),
)
register_codec(
    "torch.nn.modules.sparse.Embedding",
    Codec(
        kind=HostKind.EMBEDDING,
        shape=lambda host: (host.embedding_dim, host.num_embeddings),
        read=lambda host: host.weight.t(),
        write=lambda host, weight: overwrite(host.weight, weight.t()),
    ),
)
for _conv in ("Conv1d", "Conv2d"):
    register_codec(
        f"torch.nn.modules.conv.{_conv}",
        Codec(
            kind=HostKind.CONV,
            shape=lambda host: (host.weight.shape[0], host.weight[0].numel()),
            read=lambda host: host.weight.flatten(1),
            write=lambda host, weight: overwrite(host.weight, weight.view_as(host.weight)),
        ),
    )
