"""Delta-LoRA: the base weight follows the change of B A from step to step, without a gradient of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import Adapter, check_positive
from lora_lightning.adapters.walk import adapters_of
from lora_lightning.adapters.weights import Host
from lora_lightning.errors import ConfigError
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.low_rank import LowRankAdapter

__all__ = ["DeltaLoRA"]


class DeltaLoRAAdapter(LowRankAdapter):
    """W' = W + s B A + λ s (B A - B_K A_K) on one host, the λ term without a gradient to A and B.

    Args:
        host: The host module.
        delta_ratio: λ.
        start_step: K, the number of optimizer steps before W starts to move.
        **settings: Those of `LowRankAdapter`.

    Attributes:
        anchor_a: A_K, `[r, in]`; zero before step K.
        anchor_b: B_K, `[out, r]`; zero before step K.
        started: 1 from step K on, else 0, `[]`; a tensor, so that it travels in the state and compiled graphs stay
            whole.
    """

    anchor_a: Tensor
    anchor_b: Tensor
    started: Tensor

    def __init__(self, host: Host, *, delta_ratio: float, start_step: int, **settings: Any) -> None:  # noqa: ANN401 - see `LowRankAdapter`
        super().__init__(host, **settings)
        self.delta_ratio, self.start_step = delta_ratio, start_step
        self.register_buffer("anchor_a", torch.zeros_like(self.lora_A.detach()))
        self.register_buffer("anchor_b", torch.zeros_like(self.lora_B.detach()))
        self.register_buffer("started", torch.zeros_like(self.lora_A.detach()[0, 0]))
        if start_step == 0:
            self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Keep A and B as A_K and B_K: from here on W moves."""
        self.anchor_a.copy_(self.lora_A)
        self.anchor_b.copy_(self.lora_B)
        self.started.fill_(1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [A; A; A_K] `[3 r, in]` and [B, λ B, -λ B_K] `[out, 3 r]`; before step K the λ terms are zero."""
        (a, b), ratio = super().factors(), self.delta_ratio * self.started
        moved = ratio * self.lora_B.detach()
        return torch.cat([a, self.lora_A.detach(), self.anchor_a]), torch.cat([b, moved, -ratio * self.anchor_b], 1)


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(LoRA):
    """LoRA whose base weight moves by λ s (B_{t+1} A_{t+1} - B_t A_t) (Zi et al. 2023, arXiv 2309.02411).

    W moves from step K on, without a gradient of its own. For a constant λ the sum of its moves telescopes to
    λ s (B A - B_K A_K), so A_K and B_K are kept and no base weight is written. What flows back to the layer's input
    goes through the moved W; A and B get the gradients of LoRA at that W.

    Args:
        delta_ratio: λ, above 0.
        start_step: K, the number of optimizer steps before W starts to move, at least 0.
        dropout: Must be 0: with dropout B A would change another output than the one that the loss saw.

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "delta_lora"
    about: ClassVar[About] = About(
        trains="LoRA whose change also moves the weight",
        where="linear layers",
        principle="the weight follows LoRA's changes",
        suits="more capacity at LoRA's memory",
        difficulty="moderate: start and strength",
    )
    takes_experts: ClassVar[bool] = False
    training_settings: ClassVar[frozenset[str]] = LoRA.training_settings | {"start_step"}

    delta_ratio: float = 2.0
    start_step: int = 100

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        check_positive("DeltaLoRA", "delta_ratio", self.delta_ratio)
        step: Any = self.start_step
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ConfigError(f"DeltaLoRA: start_step must be an integer of at least 0, got {step!r}.")
        if self.init == "loftq":
            raise ConfigError(
                "DeltaLoRA: init='loftq' is not possible: its B A corrects the quantized weight, which has no change "
                "to follow. Use LoRA, or another init."
            )
        if self.dropout:
            raise ConfigError(
                f"DeltaLoRA: dropout must be 0, got {self.dropout!r}: the weight moves by the change of the whole B A, "
                "and with dropout the gradients belong to a part of it. Use LoRA for dropout."
            )

    def build(self, path: str, host: nn.Module) -> Adapter:
        """Build the adapter of one host."""
        r, scaling = self.rank_and_scaling(path)
        return DeltaLoRAAdapter(
            host, delta_ratio=self.delta_ratio, start_step=self.start_step, r=r, scaling=scaling, init=self.init
        )

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Let W start to move once K steps are done."""
        del total_steps
        if step + 1 == self.start_step:
            for _, _, adapter in adapters_of(model, self, DeltaLoRAAdapter):
                adapter.start()
