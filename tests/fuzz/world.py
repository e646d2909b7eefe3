"""What a walk carries along: a base, its adapted copy, and what both must answer."""

from __future__ import annotations

import copy
import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.backbones.attention import ROUTED
from tests.fuzz.architectures import Architecture, Batch, outputs
from tests.fuzz.draws import Setting

ROUNDING_FACTOR = 60
"""How much further than one rounding of every weight moves the output another order of the same sums may move it."""


class Fault(AssertionError):  # noqa: N818 - reads as the fact it states
    """The library did not do what it promises."""


class Pointless(Exception):  # noqa: N818 - reads as the fact it states
    """What was drawn has no part in the outputs, in the base neither."""


@dataclass
class World:
    """The state of one walk.

    Args:
        architecture: What the base is.
        base: The base, never changed.
        batch: What models are called with.
        rng: Where all draws of the walk come from.
        folder: An empty folder for the walk's files.
        model: The base with adapters.
        setting: What is attached to it.
        path: The names of the steps that were taken.
        refusals: What was refused and why.
        controls: How often the negative control of each check was seen to differ.
    """

    architecture: Architecture
    base: Any
    batch: Batch
    rng: random.Random
    folder: Path
    model: Any
    setting: Setting | None = None
    path: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    controls: dict[str, int] = field(default_factory=dict)

    def copy_of_base(self) -> Any:
        """Return a fresh copy of the base."""
        return copy.deepcopy(self.base)

    def refused(self, step: str, error: Exception) -> None:
        """Note that the library refused a step in a sentence."""
        self.refusals.append((step, str(error)))

    def new_folder(self) -> Path:
        """Return a folder that is not there yet."""
        return self.folder / f"{len(list(self.folder.iterdir()))}"

    def seed(self) -> None:
        """Seed torch by a draw."""
        torch.manual_seed(self.rng.randrange(1 << 30))

    def eps(self, model: Any = None, dtype: torch.dtype | None = None) -> float:
        """Return how far other kernels, which torch chooses by what needs a gradient, may lie: a few last bits.

        Args:
            model: The model that is compared with the base; None for the adapted one.
            dtype: The dtype that both compute in; None for the base's own.
        """
        dtype = next(self.base.parameters()).dtype if dtype is None else dtype
        is_eager = "eager" in attentions(self.base)
        is_routed = ROUTED in attentions(self.model if model is None else model)
        if is_eager and is_routed and dtype is torch.float64:
            dtype = torch.float32  # of the eager softmax, which prefixes replace by torch's own attention
        return 16 * torch.finfo(dtype).eps

    def duplicate(self) -> Any:
        """Return a deep copy of the model; torch copies no tensor with a history, which some bases keep after a call.

        Where the base does so too (the old weight and spectral norms), the model first answers without gradients.
        """
        try:
            return copy.deepcopy(self.model)
        except RuntimeError:
            if self._base_copies_after_training():
                raise
        answers(self.model, self.batch)
        return copy.deepcopy(self.model)

    def _base_copies_after_training(self) -> bool:
        base = self.copy_of_base().train().requires_grad_()
        outputs(base, self.batch)
        try:
            copy.deepcopy(base)
        except RuntimeError:
            return False
        return True

    def tolerance(self) -> float:
        """Return how far an equal computation in another order may lie from the model's, relative."""
        return tolerance(self.model, self.batch)

    def expect_equal(self, what: str, got: list[Tensor], want: list[Tensor], within: float = 0.0) -> None:
        """Raise Fault where outputs lie further apart than `within`."""
        off = distance(got, want)
        if not off <= within:
            raise Fault(f"{what}: off by {off:.1e} (at most {within:.1e})")

    def expect_other(self, what: str, got: list[Tensor], other: list[Tensor]) -> None:
        """Raise Fault where outputs are the same: the negative control."""
        if distance(got, other) == 0.0:
            raise Fault(f"control: {what} does not differ")
        self.controls[what] = self.controls.get(what, 0) + 1


def attentions(model: nn.Module) -> list[str]:
    """Return the attention implementation of each part of a model that has a config, in order."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return [str(getattr(config, "_attn_implementation", None)) for config in configs if config is not None]


@torch.no_grad()
def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return a model's outputs."""
    return [one.clone() for one in outputs(model, batch)]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest element of each wanted tensor; inf where shapes differ."""
    if [one.shape for one in got] != [one.shape for one in want]:
        return float("inf")
    found = [_distance(one.double(), other.double()) for one, other in zip(got, want, strict=True)]
    return max(found, default=0.0)


def _distance(got: Tensor, want: Tensor) -> float:
    if torch.equal(got, want):
        return 0.0
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num()) or not finite.any():
        return float("inf")
    off = float((got[finite] - want[finite]).abs().max() / want[finite].abs().max().clamp_min(1e-6))
    return off if off == off else float("inf")


@torch.no_grad()
def tolerance(model: nn.Module, batch: Batch) -> float:
    """Return how far the output moves when each weight is rounded once more, which follows from the dtype, a few times.

    A model that chooses (experts, codes) moves far when a choice flips, and says so here.
    """
    want, moved = answers(model, batch), [0.0]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        other = copy.deepcopy(model)
        eps = 0.0
        for parameter in other.parameters():
            if parameter.is_floating_point():
                eps = max(eps, torch.finfo(parameter.dtype).eps)
        for parameter in other.parameters():
            if parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator) - 0.5
                wide = parameter.double()
                parameter.copy_(wide + wide * (eps * noise))  # 1 + eps * noise would itself be rounded, to 1 in float64
        moved += [distance(answers(other, batch), want), eps]
    return ROUNDING_FACTOR * max(moved)


def digests(model: nn.Module) -> dict[str, str]:
    """Return a hash of each parameter and persistent buffer of a base, by name."""
    return {name: _digest(tensor) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0)
    return hashlib.sha256(raw.numpy().tobytes() + str(tensor.dtype).encode()).hexdigest()


def shape_of(model: nn.Module) -> tuple[Any, ...]:
    """Return all that attaching may change and `detach` must restore."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    return [type(module) for module in model.modules()], hooks, frozen, sorted(model.state_dict()), attentions(model)


@torch.no_grad()
def nudge(model: nn.Module, seed: int, std: float = 0.05) -> None:
    """Move every trainable parameter of the adapters off its value."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for _, _, adapter in iter_adapters(model):
        for parameter in adapter.parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.add_((torch.randn(parameter.shape, generator=generator) * std).to(parameter.dtype))
