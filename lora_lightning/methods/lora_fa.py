"""LoRA-FA: A stays at its random start and only B learns, so a layer keeps r numbers a token, not its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weights import HostKind, codec_of
from lora_lightning.errors import TargetError
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.low_rank import LowRankAdapter

__all__ = ["LoRAFA"]


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """W' = W + s B A with A: [r, in] frozen at its start, B: [out, r] trained (Zhang et al. 2023, arXiv 2308.03303).

    What backward needs of the input is `x A^T`, `[tokens, r]`: the input itself is not kept for this layer. B starts at
    zero, so the first forward equals the base model's exactly. A is a buffer: it travels in the adapter's state, and no
    optimizer can reach it. Hosts: as for `LoRA`, but no embeddings (there A starts at zero, and B alone could not
    learn).

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "lora_fa"
    about: ClassVar[About] = About(
        trains="`B` alone; the layer keeps `xAᵀ` for backward, not `x`",
        where="linear layers",
        principle="LoRA with A frozen",
        suits="little memory for activations",
        difficulty="easy",
    )
    takes_experts: ClassVar[bool] = False
    usual_rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)

    def build(self, path: str, host: nn.Module) -> Adapter:
        """Build the adapter of one host."""
        adapter = super().build(path, host)
        assert isinstance(adapter, LowRankAdapter)
        frozen = adapter.lora_A
        del adapter.lora_A
        adapter.register_buffer("lora_A", frozen.detach())
        return adapter

    def _check_host(self, path: str, host: nn.Module) -> None:
        if codec_of(host).kind is HostKind.EMBEDDING:
            raise TargetError(
                f"LoRAFA: {path!r} is an embedding, where A starts at zero, so that B alone could learn nothing; "
                "leave it out of the targets, or use LoRA."
            )
        super()._check_host(path, host)
