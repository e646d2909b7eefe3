"""Tell `adapters.weights` how the layers of transformers and bitsandbytes store their weights.

Importing this module registers the codecs by class name; it imports neither library.
"""

from __future__ import annotations

from torch import Tensor

from lora_lightning.adapters.weights import Codec, Host, HostKind, register_codec


def _write_transposed(host: Host, weight: Tensor) -> None:
    host.weight.data.copy_(weight.t())


def _read_4bit(host: Host) -> Tensor:
    """Return the dense weight of a `Linear4bit`; before quantization, the weight as loaded."""
    weight = host.weight
    if getattr(weight, "quant_state", None) is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _read_8bit(host: Host) -> Tensor:
    """Return the dense weight of a `Linear8bitLt`; before quantization, the weight as loaded."""
    weight, state = host.weight, host.state
    packed = state.CB if state.CB is not None else getattr(weight, "CB", None)
    scales = state.SCB if state.SCB is not None else getattr(weight, "SCB", None)
    if packed is None:
        return weight
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(packed, scales)


register_codec(
    "transformers.pytorch_utils.Conv1D",
    Codec(
        kind=HostKind.LINEAR,
        shape=lambda host: (host.weight.shape[1], host.weight.shape[0]),
        read=lambda host: host.weight.t(),
        write=_write_transposed,
    ),
)
for _name, _read in (("Linear4bit", _read_4bit), ("Linear8bitLt", _read_8bit)):
    register_codec(
        f"bitsandbytes.nn.modules.{_name}",
        Codec(
            kind=HostKind.LINEAR,
            shape=lambda host: (host.out_features, host.in_features),
            read=_read,
            write=None,
            is_view=False,
        ),
    )
