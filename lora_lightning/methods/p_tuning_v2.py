"""P-Tuning v2: deep prompts, without an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lora_lightning.adapters.about import About
from lora_lightning.adapters.view import AttentionPlace
from lora_lightning.methods.prefix import Prefix

__all__ = ["PTuningV2"]


@dataclass(frozen=True, kw_only=True)
class PTuningV2(Prefix):
    """Trainable keys and values in every layer (Liu et al. 2022, arXiv 2110.07602, section 3.2).

    Each attention sees [P_k; K] and [P_v; V] with P_k, P_v: [heads of the keys, num_virtual_tokens, head size]; real
    tokens' positions are moved on by num_virtual_tokens. For encoders as well as decoders.

    Args:
        num_virtual_tokens: How many in every layer, at least 1.

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "p_tuning_v2"
    about: ClassVar[About] = About(
        trains="keys and values in front of every layer's, directly",
        where="every attention",
        principle="deep prompts without an encoder",
        suits="understanding, sequence labelling",
        difficulty="moderate: length and rate",
    )

    def encoders(self, attentions: Sequence[AttentionPlace], width: int) -> Sequence[None]:
        """Return none: keys and values are trained directly."""
        del width
        return [None] * len(attentions)
