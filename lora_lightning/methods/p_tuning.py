"""P-Tuning: virtual tokens that come out of a small encoder while they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import check_choice, check_dropout, check_positive_int
from lora_lightning.adapters.view import ModelView, PromptPlace
from lora_lightning.methods.prompt_tuning import SoftPrompt
from lora_lightning.methods.soft_prompt import SoftPromptAdapter

__all__ = ["PTuning"]

EncoderKind = Literal["mlp", "lstm"]


class PromptEncoder(nn.Module):
    """Turns trainable embeddings `[num, width]` into virtual tokens `[num, width]`.

    Args:
        kind: `mlp` is three linear layers with ReLU between them; `lstm` a bidirectional LSTM and two linear layers.
        num: Number of virtual tokens.
        width: Width of the model's embeddings.
        hidden: Width inside.
        num_layers: Layers of the LSTM.
        dropout: Dropout between the LSTM's layers.
    """

    def __init__(self, kind: EncoderKind, num: int, width: int, hidden: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num, width))
        self.lstm: nn.LSTM | None = None
        if kind == "lstm":
            between = dropout if num_layers > 1 else 0.0
            self.lstm = nn.LSTM(width, hidden, num_layers, bidirectional=True, batch_first=True, dropout=between)
            self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            layers = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            self.mlp = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        """Return the virtual tokens `[num, width]`."""
        states = self.embedding
        if self.lstm is not None:
            states = self.lstm(states.unsqueeze(0))[0].squeeze(0)
        tokens: Tensor = self.mlp(states)
        return tokens


@dataclass(frozen=True, kw_only=True)
class PTuning(SoftPrompt):
    """Virtual tokens out of a small encoder (Liu et al. 2021, arXiv 2103.10385).

    The model sees [f(P); E(x)], with P: [num_virtual_tokens, width] and f an MLP, or a bidirectional LSTM with an MLP.
    After training f is folded away: the adapter folder holds f(P) alone.

    Args:
        num_virtual_tokens: How many, at least 1.
        encoder: `mlp` or `lstm`.
        encoder_hidden_size: Width inside the encoder; None takes the width of the embeddings (half of it for `lstm`,
            which has two directions).
        encoder_num_layers: Layers of the LSTM.
        encoder_dropout: Dropout between the LSTM's layers, in [0, 1).

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "p_tuning"
    about: ClassVar[About] = About(
        trains="virtual tokens in front of the input, out of an MLP or LSTM that is folded away",
        where="the model's input",
        principle="trained embeddings out of a small encoder",
        suits="understanding with frozen models",
        difficulty="moderate: an encoder",
    )
    size_setting: ClassVar[str | None] = None  # nearly all parameters are the encoder's, which is folded away
    training_settings: ClassVar[frozenset[str]] = SoftPrompt.training_settings | {
        *("encoder", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
    }
    usual_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)

    encoder: EncoderKind = "mlp"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        check_choice("PTuning", "encoder", self.encoder, ("mlp", "lstm"))
        check_positive_int("PTuning", "encoder_num_layers", self.encoder_num_layers)
        if self.encoder_hidden_size is not None:
            check_positive_int("PTuning", "encoder_hidden_size", self.encoder_hidden_size)
        check_dropout("PTuning", self.encoder_dropout)

    def build(self, view: ModelView, place: PromptPlace) -> SoftPromptAdapter:
        """Build the adapter of the model's body."""
        weight = next(view.model.get_submodule(place.body).get_submodule(place.embedding).parameters())
        width = weight.shape[1]
        hidden = self.encoder_hidden_size or (max(width // 2, 1) if self.encoder == "lstm" else width)
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        encoder = PromptEncoder(
            self.encoder, self.num_virtual_tokens, width, hidden, self.encoder_num_layers, self.encoder_dropout
        )
        return SoftPromptAdapter(place, self.num_virtual_tokens, encoder=encoder.to(device=weight.device, dtype=dtype))
