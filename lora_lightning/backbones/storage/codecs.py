"""Tell `adapters.weights` how the layers of transformers and bitsandbytes store their weights.

Importing this module registers the codecs by class name; it imports neither library.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.weights import Codec, Host, HostKind, overwrite, register_codec


def _write_transposed(host: Host, weight: Tensor) -> None:
    overwrite(host.weight, weight.t())


def _read_4bit(host: Host) -> Tensor:
    """Return the dense weight of a `Linear4bit`; before quantization, the weight as loaded."""
    weight = host.weight
    if getattr(weight, "quant_state", None) is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*_usual_layout(weight.data, weight.quant_state))


def restore_layout(host: Host) -> None:
    """Bring the weight of a `Linear4bit` back from the layout of bitsandbytes' inference kernel for CPUs.

    In that layout it can neither train nor be dequantized. The constants stay rounded to bfloat16, as the change of
    layout left them.
    """
    if getattr(getattr(host.weight, "quant_state", None), "packing_format_for_cpu", False):
        host.weight.data, host.weight.quant_state = _usual_layout(host.weight.data, host.weight.quant_state)
        host.quant_state = host.weight.quant_state


def _usual_layout(packed: Tensor, state: Any) -> tuple[Tensor, Any]:  # noqa: ANN401 - bitsandbytes' QuantState
    """Return packed data and its state in the usual layout, both unchanged where they have it already."""
    if not getattr(state, "packing_format_for_cpu", False):
        return packed, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    usual = copy.copy(state)
    usual.original_nested = False  # its own way back quantizes the constants once more
    packed, usual = _convert_weight_packed_for_cpu_inverse(packed, usual)
    usual.absmax = state.absmax.t().reshape(-1).float()
    return packed, usual


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


def _product_dtype_4bit(host: Host, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype that a `Linear4bit` multiplies in, once it is quantized."""
    is_quantized = getattr(host.weight, "quant_state", None) is not None
    return (host.compute_dtype or dtype) if is_quantized else None


# An 8-bit layer rounds its input too, so its product is not that of the weight that it stores.
for _name, _read, _dtype in (
    ("Linear4bit", _read_4bit, _product_dtype_4bit),
    ("Linear8bitLt", _read_8bit, lambda _, __: None),
):
    register_codec(
        f"bitsandbytes.nn.modules.{_name}",
        Codec(
            kind=HostKind.LINEAR,
            shape=lambda host: (host.out_features, host.in_features),
            read=_read,
            write=None,
            is_view=False,
            product_dtype=_dtype,
        ),
    )
