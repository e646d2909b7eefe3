"""How the frozen base is stored: in 4 or 8 bits a weight, by bitsandbytes through transformers (QLoRA's base)."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lora_lightning.errors import BackboneError, ConfigError
from lora_lightning.keywords import names_nearest

__all__ = ["Quantization"]

Bits = Literal[4, 8]
QuantType = Literal["nf4", "fp4"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
StorageDtype = Literal["auto", "uint8", "float32", "bfloat16", "float16"]
_CHOICES: dict[str, tuple[Any, ...]] = {
    "bits": (4, 8),
    "quant_type": ("nf4", "fp4"),
    "double_quant": (True, False),
    "compute_dtype": ("auto", "float32", "bfloat16", "float16"),
    "storage_dtype": ("auto", "uint8", "float32", "bfloat16", "float16"),
}
_BLOCK, _OUTER_BLOCK = 64, 256


@names_nearest
@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the frozen base is stored; the adapters stay in full precision (QLoRA, Dettmers et al. 2023, 2305.14314).

    Linear layers are quantized while the model is loaded, each on the device that it will stay on. Embeddings, norms,
    heads, poolers and modules that a method copies (`modules_to_save`) stay dense.

    Args:
        bits: 4, or 8 (LLM.int8(), arXiv 2208.07339). The four others are for 4 bits only.
        quant_type: `nf4`, whose steps suit normally distributed weights, or `fp4`.
        double_quant: Whether the constants are quantized too, which saves 0.37 bits a weight.
        compute_dtype: In which a layer multiplies; `auto` is bfloat16 on a GPU and on a CPU that has instructions for
            it, else float32.
        storage_dtype: In which the packed bits lie; `auto` is uint8.

    Raises:
        ConfigError: A value is not among those named, or is for 4 bits and given with 8.

    Example:
        >>> round(Quantization().bits_per_weight, 3), Quantization(double_quant=False).bits_per_weight
        (4.127, 4.5)
    """

    bits: Bits = 4
    quant_type: QuantType = "nf4"
    double_quant: bool = True
    compute_dtype: ComputeDtype = "auto"
    storage_dtype: StorageDtype = "auto"

    def __post_init__(self) -> None:
        """Check every value."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices or isinstance(value, bool) is not isinstance(choices[0], bool):
                raise ConfigError(f"Quantization: {name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        given = [name for name in ("compute_dtype", "storage_dtype") if getattr(self, name) != "auto"]
        given += ["quant_type"] if self.quant_type != "nf4" else []
        if self.bits == 8 and given:
            raise ConfigError(
                f"Quantization: {', '.join(given)} is for 4 bits; in 8 bits a layer computes in its input's dtype. "
                "Leave it out."
            )

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight costs in a large layer: packed data and constants."""
        if self.bits == 8:
            return 8.0
        return self.bits + ((8 + 32 / _OUTER_BLOCK) if self.double_quant else 32) / _BLOCK

    @property
    def label(self) -> str:
        """The format's usual name: `nf4`, `fp4` or `int8`."""
        return self.quant_type if self.bits == 4 else "int8"

    def compute_dtype_on(self, device: torch.device) -> torch.dtype:
        """Return the dtype that layers compute in on a device."""
        if self.compute_dtype != "auto":
            dtype = getattr(torch, self.compute_dtype)
            assert isinstance(dtype, torch.dtype)
            return dtype
        return torch.bfloat16 if device.type != "cpu" or cpu_has_bfloat16() else torch.float32

    def to_transformers(self, device: torch.device, dense: Sequence[str]) -> Any:  # noqa: ANN401 - BitsAndBytesConfig
        """Return transformers' own form of these settings.

        Args:
            device: Where the model is going to be.
            dense: Modules to leave as they are.
        """
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(dense))
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=list(dense),
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype_on(device),
            bnb_4bit_quant_storage="uint8" if self.storage_dtype == "auto" else self.storage_dtype,
        )


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 with instructions of its own; else it is several times slower."""
    # The names are torch's private ones; there are no public ones yet.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if any(check is not None for check in checks):
        return any(check() for check in checks if check is not None)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def require_packages() -> None:
    """Import bitsandbytes without its complaint about a kernel that we do not use.

    Raises:
        BackboneError: It, or accelerate, through which transformers places weights, is not installed.
    """
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackboneError(
            f"A quantized base needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed: pip install 'lora-lightning[quant]'"
        )
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
