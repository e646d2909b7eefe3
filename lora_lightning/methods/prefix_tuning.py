"""Prefix tuning: keys and values in every layer, out of a shared MLP while they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import check_positive_int
from lora_lightning.adapters.view import AttentionPlace
from lora_lightning.errors import ConfigError
from lora_lightning.methods.prefix import Prefix

__all__ = ["PrefixTuning"]


class SharedPrefix(nn.Module):
    """The part of the encoder that all layers share: tanh(E W^T + b).

    Args:
        num: Number of virtual tokens.
        width: Width of E.
        hidden: Width of the result.

    Attributes:
        embedding: E, `[num, width]`.
    """

    def __init__(self, num: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num, width))
        self.project = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        """Return `[num, hidden]`."""
        return torch.tanh(self.project(self.embedding))


class LayerPrefix(nn.Module):
    """One layer's rows of the encoder's last linear map.

    Each layer calls the shared part anew: it is small, and parameters are what gradient checkpointing can recompute
    from.

    Args:
        shared: The part that all layers share.
        hidden: Its width.
        place: The attention module.
    """

    def __init__(self, shared: SharedPrefix, hidden: int, place: AttentionPlace) -> None:
        super().__init__()
        self.shared = shared
        self.num_heads = place.num_heads
        self.widths = place.num_heads * place.head_size, place.num_heads * place.value_size
        self.project = nn.Linear(hidden, sum(self.widths))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, `[num, heads, head size]` each."""
        keys, values = self.project(self.shared()).split(self.widths, 1)
        return keys.unflatten(1, (self.num_heads, -1)), values.unflatten(1, (self.num_heads, -1))


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Prefix):
    """Trainable keys and values in every layer, out of an MLP (Li & Liang 2021, arXiv 2101.00190, section 4.3).

    [P_k; P_v] of all layers = W_2 tanh(W_1 E + b_1) + b_2 with E: [num_virtual_tokens, width]. After training the MLP
    is folded away: the adapter folder holds the keys and values alone.

    Args:
        num_virtual_tokens: How many in every layer, at least 1.
        prefix_projection: Whether the MLP makes them during training; without it this is P-Tuning v2.
        encoder_hidden_size: Width of the MLP's inside; None takes the width of the model's embeddings.

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "prefix_tuning"
    about: ClassVar[About] = About(
        trains="keys and values in front of every layer's, out of an MLP that is folded away",
        where="every attention",
        principle="trained keys and values in every layer",
        suits="generation",
        difficulty="moderate: reparameterised",
    )
    size_setting: ClassVar[str | None] = None  # nearly all parameters are the encoder's, which is folded away
    training_settings: ClassVar[frozenset[str]] = Prefix.training_settings | {
        "prefix_projection",
        "encoder_hidden_size",
    }
    usual_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)

    prefix_projection: bool = True
    encoder_hidden_size: int | None = None

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        if self.encoder_hidden_size is not None:
            check_positive_int("PrefixTuning", "encoder_hidden_size", self.encoder_hidden_size)
            if not self.prefix_projection:
                raise ConfigError(
                    "PrefixTuning: encoder_hidden_size belongs to the MLP, which prefix_projection=False leaves out."
                )

    def encoders(self, attentions: Sequence[AttentionPlace], width: int) -> Sequence[nn.Module | None]:
        """Return each attention's encoder around the part that all share."""
        if not self.prefix_projection:
            return [None] * len(attentions)
        hidden = self.encoder_hidden_size or width
        shared = SharedPrefix(self.num_virtual_tokens, width, hidden)
        return [LayerPrefix(shared, hidden, place) for place in attentions]
