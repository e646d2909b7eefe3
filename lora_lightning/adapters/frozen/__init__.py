"""What of a frozen base is no parameter, and must not move either: statistics of norms, and other buffers."""

from lora_lightning.adapters.frozen.buffers import KeptBuffers
from lora_lightning.adapters.frozen.norms import (
    NormStatistics,
    base_norms,
    freeze_norms,
    has_statistics,
    release_modes,
    restore_after_conversion,
    trains_statistics,
)

__all__ = [
    "KeptBuffers",
    "NormStatistics",
    "base_norms",
    "freeze_norms",
    "has_statistics",
    "release_modes",
    "restore_after_conversion",
    "trains_statistics",
]
