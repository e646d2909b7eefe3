"""AdaLoRA: the rank of each host is learned, within a budget for the whole model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import (
    Adapter,
    Role,
    TargetedMethod,
    check_dropout,
    check_positive,
    check_positive_int,
)
from lora_lightning.adapters.sharded import is_shard
from lora_lightning.adapters.targets import select_hosts, takes_all_linear
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.walk import adapters_of
from lora_lightning.adapters.weights import Host, codec_of
from lora_lightning.errors import ConfigError
from lora_lightning.methods.lora import check_host, check_rank
from lora_lightning.methods.low_rank import LowRankAdapter

__all__ = ["AdaLoRA"]

_REMEDY = "Lower init_r (one and a half times target_r unless given), or leave this layer out."
_PARTS = ("lora_A", "lora_E", "lora_B")


class AdaLoRAAdapter(LowRankAdapter):
    """W' = W + s P Λ Q on one host: a singular value decomposition in form, kept near one by a penalty.

    Args:
        host: The host module.
        **settings: `r`, `scaling` and `dropout` of `LowRankAdapter`; r is the rank at the start.

    Attributes:
        lora_A: Q, `[r, in]`.
        lora_B: P, `[out, r]`.
        lora_E: The diagonal of Λ, `[r]`; zero for a pruned triplet.
        kept: Which triplets the final pruning kept, `[r]`; None before it.
    """

    lora_E: nn.Parameter
    kept: Tensor | None

    def __init__(self, host: Host, **settings: Any) -> None:  # noqa: ANN401 - see `LowRankAdapter`
        super().__init__(host, **settings)
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(self.r))
        # Only training needs these, so they are made when it starts and travel in `AdaLoRA.extra_state`.
        for name in self.training_state_names():
            self.register_buffer(name, None, persistent=False)

    @staticmethod
    def training_state_names() -> list[str]:
        """Return the buffers that a resumed run needs: both moving averages of each parameter, and `kept`."""
        return ["kept", *(f"{part}_{kind}" for part in _PARTS for kind in ("sensitivity", "uncertainty"))]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw P and Q anew, Gaussian with std 0.02, and set Λ to zero, where it exists already."""
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        if "lora_E" in self._parameters:
            nn.init.zeros_(self.lora_E)

    def role_of(self, name: str) -> Role:
        """Return VECTOR for Λ, else as LoRA."""
        return Role.VECTOR if name == "lora_E" else super().role_of(name)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return Λ Q `[r, in]` and P `[out, r]`."""
        return self.lora_E[:, None] * self.lora_A, self.lora_B

    def pruned_factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the surviving triplets alone, detached: what a plain LoRA of lower rank holds.

        The factor s stays `self.scaling`. Where all triplets are pruned, one of them is returned, with a zero row in
        A, since a LoRA has at least rank 1.

        Returns:
            A `[rank, in]` and B `[out, rank]` with 1 <= rank <= r.
        """
        alive = self.lora_E.detach() != 0
        if not alive.any():
            alive[0] = True
        a, b = self.factors()
        return a.detach()[alive], b.detach()[:, alive]

    def orthogonality(self) -> Tensor:
        """Return ‖P^T P - I‖_F + ‖Q Q^T - I‖_F, a scalar."""
        grams = self.lora_A @ self.lora_A.t(), self.lora_B.t() @ self.lora_B
        eye = torch.eye(self.r, dtype=self.lora_A.dtype, device=self.lora_A.device)
        return torch.stack([torch.linalg.matrix_norm(gram - eye) for gram in grams]).sum()

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Move both averages by the gradients at hand (section 3.2); does nothing without gradients."""
        for part in _PARTS:
            parameter = getattr(self, part)
            if parameter.grad is None:
                continue
            names = f"{part}_sensitivity", f"{part}_uncertainty"
            for name in names:
                if getattr(self, name) is None:
                    setattr(self, name, torch.zeros_like(parameter))
            sensitivity, uncertainty = (getattr(self, name) for name in names)
            current = (parameter * parameter.grad).abs()
            sensitivity.lerp_(current, 1 - beta1)
            uncertainty.lerp_((current - sensitivity).abs_(), 1 - beta2)

    def triplet_scores(self) -> Tensor:
        """Return the importance of each triplet, `[r]` (section 3.2); zero where nothing was observed."""
        scores = torch.zeros_like(self.lora_E.detach())
        for part, mean_over in (("lora_A", 1), ("lora_E", None), ("lora_B", 0)):
            sensitivity, uncertainty = getattr(self, f"{part}_sensitivity"), getattr(self, f"{part}_uncertainty")
            if sensitivity is not None:
                score = sensitivity * uncertainty
                scores += score if mean_over is None else score.mean(mean_over)
        return scores


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(TargetedMethod):
    """W' = W + s P Λ Q with P: [out, r], Λ diagonal, Q: [r, in] (Zhang et al. 2023, arXiv 2303.10512, section 3.1).

    Every host starts with `init_r` triplets (an element of Λ with its column of P and row of Q). A triplet's importance
    is the sensitivity `|w · ∂L/∂w|` of its weights, smoothed by two moving averages (section 3.2). While the
    budget of the whole model falls along a cubic curve (section 3.3), the least important triplets get Λ = 0; such a
    triplet may come back until the final pruning, which leaves `target_r` times the number of hosts for good. Hosts
    differ in what they are left with. Λ starts at zero, so the first forward equals the base model's exactly.

    s = alpha / init_r throughout, as in PEFT (which adds 1e-5 to init_r). The penalty is the mean of ‖P^T P - I‖_F and
    ‖Q Q^T - I‖_F over all matrices, not squared: what the authors' code and PEFT compute, and what
    `orthogonality_weight` is chosen for (section 3.1 has the squares). The budget needs the number of steps of the run,
    so set `max_steps` or `max_epochs`.

    Args:
        target_r: Rank at the end, an average over the hosts.
        init_r: Rank of every host at the start, at least `target_r`; None takes one and a half times `target_r`. Under
            `all-linear` a narrower host starts with its narrower side.
        t_init: Steps before the budget falls; None takes a tenth of the run.
        t_final: Steps after the final pruning; None takes three tenths of the run.
        delta_t: Steps from one pruning to the next.
        beta1: Decay of the sensitivity's moving average, in (0, 1).
        beta2: Decay of its uncertainty's moving average, in (0, 1).
        orthogonality_weight: Weight of the penalty, 0 or above.
        alpha: Numerator of the scaling s, above 0.
        dropout: Probability of zeroing an element of Q's input in training, in [0, 1).
        wide_ranks: Accept an `init_r` above the smaller side of a weight, which trains no more than that side's rank
            but costs more. A finished adapter of PEFT may have one, and `load_peft` then sets this.

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "adalora"
    about: ClassVar[About] = About(
        trains="`W + s·PΛQ`; the budget of ranks moves to the layers that need it",
        where="linear layers",
        principle="ranks distributed by importance",
        suits="uneven layers, a tight budget",
        difficulty="moderate: a schedule",
    )
    size_setting: ClassVar[str | None] = "target_r"
    usual_rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)
    training_settings: ClassVar[frozenset[str]] = TargetedMethod.training_settings | {
        *("dropout", "wide_ranks", "t_init", "t_final", "delta_t", "beta1", "beta2", "orthogonality_weight")
    }

    target_r: int = 8
    init_r: int | None = None
    t_init: int | None = None
    t_final: int | None = None
    delta_t: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality_weight: float = 0.5
    alpha: float = 16.0
    dropout: float = 0.0
    wide_ranks: bool = False

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        check_positive_int("AdaLoRA", "target_r", self.target_r)
        check_positive_int("AdaLoRA", "delta_t", self.delta_t)
        check_positive("AdaLoRA", "alpha", self.alpha)
        check_dropout("AdaLoRA", self.dropout)
        if self.init_r is not None:
            check_positive_int("AdaLoRA", "init_r", self.init_r)
            if self.init_r < self.target_r:
                raise ConfigError(
                    f"AdaLoRA: init_r={self.init_r} is below target_r={self.target_r}, and the budget only falls; "
                    "raise init_r, or leave it out for one and a half times target_r."
                )
        for name in ("t_init", "t_final"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"AdaLoRA: {name} must be an integer of at least 0 (steps), got {value!r}.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise ConfigError(f"AdaLoRA: {name} must lie between 0 and 1, both excluded, got {value!r}.")
        if self.orthogonality_weight != 0:
            check_positive("AdaLoRA", "orthogonality_weight (unless it is 0)", self.orthogonality_weight)

    @property
    def start_rank(self) -> int:
        """Rank of every host at the start."""
        return round(1.5 * self.target_r) if self.init_r is None else self.init_r

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build one adapter per host; see `Method.adapters`."""
        hosts, r = select_hosts(view, self), self.start_rank
        for path, host in hosts:
            check_host(path, host)
        ranks = self._start_ranks({path: codec_of(host).shape(host) for path, host in hosts}, view)
        for path, host in hosts:
            yield path, AdaLoRAAdapter(host, r=ranks[path], scaling=self.alpha / r, dropout=self.dropout)

    def _start_ranks(self, shapes: Mapping[str, tuple[int, int]], view: ModelView) -> dict[str, int]:
        """Return the rank of each host at the start, which `all-linear` caps unless `wide_ranks` is set.

        Args:
            shapes: `(out, in)` of each host, by path.
            view: The model.

        Raises:
            ConfigError: A layer that is named is narrower, or all are.
        """
        r = self.start_rank
        if self.wide_ranks:
            return dict.fromkeys(shapes, r)
        is_capped = takes_all_linear(view, self) and any(min(shape) >= r for shape in shapes.values())
        for path, shape in shapes.items():
            if not is_capped:
                check_rank("AdaLoRA", path, shape, r, setting="init_r", remedy=_REMEDY)
        ranks = {path: min(r, *shape) for path, shape in shapes.items()}
        narrow = [path for path in ranks if ranks[path] < r]
        if narrow:
            warnings.warn(
                f"all-linear: {len(narrow)} of {len(ranks)} layers are narrower than init_r={r}, such as "
                f"{narrow[0]!r}; the rank of each is its narrower side.",
                stacklevel=3,
            )
        return ranks

    def schedule(self, total_steps: int) -> tuple[int, int]:
        """Return the steps after which the budget starts to fall, and after which the final pruning comes.

        Raises:
            ConfigError: The run has no known length, or is too short for `t_init` and `t_final`.

        Example:
            >>> AdaLoRA().schedule(100), AdaLoRA(t_init=5, t_final=20).schedule(100)
            ((10, 70), (5, 80))
        """
        if total_steps < 0:
            raise ConfigError(
                "AdaLoRA spreads its budget over the whole run, and this run has no known number of steps; set "
                "max_steps, or max_epochs over data of known length."
            )
        t_init = total_steps // 10 if self.t_init is None else self.t_init
        t_final = 3 * total_steps // 10 if self.t_final is None else self.t_final
        if t_init + t_final >= total_steps:
            raise ConfigError(
                f"AdaLoRA: t_init={t_init} and t_final={t_final} leave nothing of a run of {total_steps} steps for the "
                "budget to fall in; lower them, or train longer."
            )
        return t_init, total_steps - t_final

    def budget(self, step: int, total_steps: int, num_hosts: int) -> int:
        """Return how many triplets the whole model may have after `step` updates (section 3.3).

        Example:
            >>> [AdaLoRA(target_r=2, init_r=4).budget(step, 100, num_hosts=8) for step in (10, 20, 40, 70)]
            [32, 25, 18, 16]
        """
        start, end = self.schedule(total_steps)
        first, last = self.start_rank * num_hosts, self.target_r * num_hosts
        progress = min(max(step - start, 0) / (end - start), 1.0)
        return last + math.floor((first - last) * (1 - progress) ** 3)

    def _own(self, model: nn.Module) -> list[tuple[str, AdaLoRAAdapter]]:
        return [(path, adapter) for path, _, adapter in adapters_of(model, self, AdaLoRAAdapter)]

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """Return the orthogonality penalty: its mean over all P and Q, times its weight."""
        if self.orthogonality_weight == 0:
            return None
        penalties = [adapter.orthogonality() for _, adapter in self._own(model)]
        return torch.stack(penalties).mean() * (self.orthogonality_weight / 2)

    def before_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Take the gradients into the moving averages, until the final pruning."""
        _, end = self.schedule(total_steps)
        if step < end:
            for path, adapter in self._own(model):
                if is_shard(adapter.lora_A):
                    raise ConfigError(
                        f"AdaLoRA compares the triplets of all layers, and {path!r} is sharded over several processes "
                        "(FSDP); train with DDP instead."
                    )
                adapter.observe(self.beta1, self.beta2)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Set Λ of the least important triplets to zero, every `delta_t` steps; after the final pruning, every step."""
        start, end = self.schedule(total_steps)
        done = step + 1
        adapters = [adapter for _, adapter in self._own(model)]
        if done == end or (start < done < end and done % self.delta_t == 0):
            masks = _most_important(adapters, self.budget(done, total_steps, len(adapters)))
            for adapter, mask in zip(adapters, masks, strict=True):
                adapter.lora_E.masked_fill_(~mask, 0)
                adapter.kept = mask if done == end else None
        elif done > end:
            for adapter in adapters:
                if adapter.kept is not None:
                    adapter.lora_E.masked_fill_(~adapter.kept, 0)  # the optimizer's momentum still moves it

    def extra_state(self, model: nn.Module) -> dict[str, Any]:
        """Return the moving averages and the final choice, by host path and name."""
        return {
            f"{path}.{name}": getattr(adapter, name).clone()
            for path, adapter in self._own(model)
            for name in adapter.training_state_names()
            if getattr(adapter, name) is not None
        }

    def load_extra_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take back what `extra_state` returned."""
        for path, adapter in self._own(model):
            for name in adapter.training_state_names():
                tensor = state.get(f"{path}.{name}")
                setattr(adapter, name, None if tensor is None else tensor.to(adapter.lora_E.device, copy=True))


def _most_important(adapters: list[AdaLoRAAdapter], budget: int) -> list[Tensor]:
    """Return, per adapter, which triplets are among the `budget` most important; of equal ones, the first."""
    scores = torch.cat([adapter.triplet_scores() for adapter in adapters])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:budget]] = True
    return list(torch.split(chosen, [adapter.r for adapter in adapters]))
