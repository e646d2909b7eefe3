"""LoRA: a trainable low-rank update beside a frozen weight."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import (
    Adapter,
    TargetedMethod,
    check_choice,
    check_dropout,
    check_positive,
    check_positive_int,
)
from lora_lightning.adapters.experts import expert_weights, read_experts
from lora_lightning.adapters.targets import by_pattern, check_patterns, select_hosts, select_weights, takes_all_linear
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.walk import adapters_of
from lora_lightning.adapters.weights import HostKind, codec_of, find_codec
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods.eva import start_from_data
from lora_lightning.methods.expert_lora import EXPERT_INITS, ExpertLoRAAdapter
from lora_lightning.methods.low_rank import LowRankAdapter
from lora_lightning.methods.parameter_lora import ParameterLoRAAdapter

__all__ = ["LoRA"]

Scaling = Literal["standard", "rslora", "alpha"]
_LIMITED_INITS = ("pissa", "olora", "loftq")
"""Starts that take a rank of the weight itself."""

_REMEDY = "Lower r, or give this layer its own with rank_pattern."
Init = Literal["kaiming", "gaussian", "gaussian_sqrt", "pissa", "olora", "loftq", "eva"]


@dataclass(frozen=True, kw_only=True)
class LoRA(TargetedMethod):
    """W' = W + s B A with A: [r, in], B: [out, r] (Hu et al. 2021, arXiv 2106.09685, equation 3).

    B starts at zero, so the first forward equals the base model's exactly. Hosts: linear layers (4-bit and 8-bit
    ones too), GPT-2's Conv1D, embeddings, 1-d and 2-d convolutions, and the experts of transformers' mixtures, whose
    3-D parameters get an A `[experts, r, in]` and a B `[experts, out, r]` each. They are taken where they are named:
    `experts` takes all parameters of these modules, `experts.down_proj` in a list this one alone; `all-linear` leaves
    them out. A 2-D or 3-D parameter of any other module is taken where a list names it with its module, such as a
    router's `gate.weight`; its update is built whole in each forward, without dropout.

    Args:
        r: Rank, from 1 to the smaller side of each adapted weight; `all-linear` caps it at that side instead.
        alpha: Numerator of the scaling s, above 0.
        dropout: Probability of zeroing an element of A's input in training, in [0, 1).
        scaling: `standard` is s = alpha / r, `rslora` is s = alpha / sqrt(r) (arXiv 2312.03732), `alpha` is s = alpha.
        init: How A starts: `kaiming` uniform with a = sqrt(5), `gaussian` with std 1/r as in PEFT, or
            `gaussian_sqrt` with std 1/sqrt(r). `pissa` (arXiv 2404.02948) starts A and B at the r largest singular
            values of W, `olora` (arXiv 2406.01775) at the first r columns and rows of its QR decomposition; both as
            W' = W + s (B A - B0 A0), so that the first forward equals the base's up to rounding, and the base weight
            stays. `loftq` (arXiv 2310.08659) starts s B A at the best rank-r correction of the error that quantizing
            made: for 4-bit and 8-bit hosts of a transformers model, whose files are read once more. The base that
            `disabled` gives is then the quantized one, without the correction.
            `eva` starts A at the main directions (right singular vectors) of what the host is fed in the first batches
            (arXiv 2410.07170; every host keeps its rank r): a task looks at the data before it builds the optimizer;
            without a task, call `method.calibrate(model, batches, loss)` after `attach`, and until then A is as for
            `kaiming`. Linear hosts only. Experts take `kaiming`, `gaussian` and `gaussian_sqrt`.
        rank_pattern: Other ranks for some hosts, by path suffix or regular expression; a parameter of experts goes by
            its own path first, then by its module's. They may exceed what `r` may be, as those of finished adapters
            do, unless `init` starts in the weight.
        alpha_pattern: Other alphas for some hosts, likewise.

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "lora"
    about: ClassVar[About] = About(
        trains=(
            "`W + s·BA`; scalings `standard`, `rslora`, `alpha`; starts `kaiming`, `gaussian`, `pissa`, "
            "`olora`, `loftq`, `eva`"
        ),
        where=(
            "linear layers, GPT-2's Conv1D, embeddings, convolutions, 4- and 8-bit linears, experts (3-D "
            "tensors) of Mixtral, Qwen-MoE, DeepSeek, GPT-OSS, …, parameters by name"
        ),
        principle="low-rank update beside each weight",
        suits="the usual first choice",
        difficulty="easy: rank and rate",
    )
    size_setting: ClassVar[str | None] = "r"
    training_settings: ClassVar[frozenset[str]] = TargetedMethod.training_settings | {"dropout", "init"}
    takes_experts: ClassVar[bool] = True

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: Scaling = "standard"
    init: Init = "kaiming"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        owner = type(self).__name__
        check_positive_int(owner, "r", self.r)
        check_positive(owner, "alpha", self.alpha)
        check_dropout(owner, self.dropout)
        check_choice(owner, "scaling", self.scaling, ("standard", "rslora", "alpha"))
        check_choice(owner, "init", self.init, get_args(Init))
        for pattern, rank in (self.rank_pattern or {}).items():
            check_positive_int(owner, f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in (self.alpha_pattern or {}).items():
            check_positive(owner, f"alpha_pattern[{pattern!r}]", alpha)

    def rank_and_scaling(self, path: str, parameter: str = "") -> tuple[int, float]:
        """Return the rank and the factor s of the host at `path`, or of one parameter of the experts there.

        Example:
            >>> LoRA(r=4, alpha=8, rank_pattern={"value": 2}).rank_and_scaling("layer.0.value")
            (2, 4.0)
        """
        r, alpha = by_pattern(path, self.rank_pattern, self.r), by_pattern(path, self.alpha_pattern, self.alpha)
        if parameter:
            inside = f"{path}.{parameter}"
            r, alpha = by_pattern(inside, self.rank_pattern, r), by_pattern(inside, self.alpha_pattern, alpha)
        return r, alpha / self._divisor(r)

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build one adapter per host; see `Method.adapters`."""
        hosts = select_hosts(view, self)
        by_parameter: dict[str, list[str]] = {path: [] for path, host in hosts if find_codec(host) is None}
        paths = [path for path, _ in hosts]
        for path, _ in select_weights(view, self) if by_parameter else ():
            holder, _, name = path.rpartition(".")
            if holder in by_parameter:
                by_parameter[holder].append(name)
                paths.append(path)
        check_patterns("rank_pattern", self.rank_pattern, paths)
        check_patterns("alpha_pattern", self.alpha_pattern, paths)
        fitted = self._capped(hosts) if takes_all_linear(view, self) else self
        for path, host in hosts:
            if path in by_parameter:
                fitted._check_parameters(path, host, by_parameter[path])
            else:
                fitted._check_host(path, host)
        for path, host in hosts:
            names = by_parameter.get(path)
            yield path, fitted.build(path, host) if names is None else fitted._build_parameters(path, host, names)

    def _capped(self, hosts: Sequence[tuple[str, nn.Module]]) -> Self:
        """Return this method with the rank of each host that is narrower than `r` capped; the factor s stays.

        Where all of them are, `r` is the mistake, and stays for `check_rank` to refuse.
        """
        ranks, alphas = {}, {}
        for path, host in hosts:
            limit = min(codec_of(host).shape(host))
            if self.r > limit and not self._has_own_rank(path):
                _, scaling = self.rank_and_scaling(path)
                ranks[f"^{re.escape(path)}"] = limit
                alphas[f"^{re.escape(path)}"] = scaling * self._divisor(limit)
                narrowest = path, codec_of(host).shape(host)
        if len(ranks) in (0, len(hosts)):
            return self
        path, (num_out, num_in) = narrowest
        warnings.warn(
            f"all-linear: {len(ranks)} of {len(hosts)} layers are narrower than r={self.r}, such as {path!r} "
            f"({num_out} x {num_in}); the rank of each is its narrower side.",
            stacklevel=2,
        )
        rank_pattern, alpha_pattern = {**ranks, **(self.rank_pattern or {})}, {**alphas, **(self.alpha_pattern or {})}
        return replace(self, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)

    def _has_own_rank(self, path: str) -> bool:
        return by_pattern(path, dict.fromkeys(self.rank_pattern or {}, True), default=False)

    def _divisor(self, r: int) -> float:
        return {"standard": r, "rslora": math.sqrt(r), "alpha": 1}[self.scaling]

    @property
    def calibrates(self) -> bool:
        """Whether A is to start from data."""
        return self.init == "eva"

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Start A from the data where `init` is `eva`; see `Method.calibrate`."""
        if self.init == "eva":
            adapters = {path: adapter for path, _, adapter in adapters_of(model, self, LowRankAdapter)}
            start_from_data(model, adapters, batches, loss)

    def build(self, path: str, host: nn.Module) -> Adapter:
        """Build the adapter of one host."""
        r, scaling = self.rank_and_scaling(path)
        return LowRankAdapter(host, r=r, scaling=scaling, dropout=self.dropout, init=self.init)

    def _build_parameters(self, path: str, host: nn.Module, names: Sequence[str]) -> Adapter:
        found = {name: self.rank_and_scaling(path, name) for name in names}
        ranks, scalings = {name: r for name, (r, _) in found.items()}, {name: s for name, (_, s) in found.items()}
        if expert_weights(host):
            return ExpertLoRAAdapter(host, ranks=ranks, scalings=scalings, dropout=self.dropout, init=self.init)
        return ParameterLoRAAdapter(host, ranks=ranks, scalings=scalings, init=self.init)

    def _check_parameters(self, path: str, host: nn.Module, names: Sequence[str]) -> None:
        owner = type(self).__name__
        if self.init not in EXPERT_INITS:
            raise ConfigError(
                f"{owner}: init={self.init!r} is not defined for experts and other parameters, and {path!r} holds "
                f"some; use one of {', '.join(EXPERT_INITS)}, or leave them out of the targets."
            )
        is_experts = bool(expert_weights(host))
        for name in names:
            r, _ = self.rank_and_scaling(path, name)
            weight = read_experts(host, name) if is_experts else host.get_parameter(name)
            num_out, num_in = weight.shape[-2:]
            if not (self._has_own_rank(path) or self._has_own_rank(f"{path}.{name}")):
                check_rank(owner, f"{path}.{name}", (num_out, num_in), r, remedy=_REMEDY)

    def _check_host(self, path: str, host: nn.Module) -> None:
        r, _ = self.rank_and_scaling(path)
        check_host(path, host)
        if self.init in _LIMITED_INITS or not self._has_own_rank(path):
            check_rank(type(self).__name__, path, codec_of(host).shape(host), r, remedy=_REMEDY)
        # A model without weights is quantized when it is filled.
        is_hollow = next(host.parameters(recurse=False)).is_meta
        if self.init == "loftq" and codec_of(host).write is not None and not is_hollow:
            raise ConfigError(
                f"{type(self).__name__}: init='loftq' corrects the error of quantizing, and {path!r} is stored dense: "
                "there is nothing to correct. Set quantization, or use init='pissa'."
            )
        kind = codec_of(host).kind
        if self.init == "eva" and kind is not HostKind.LINEAR:
            raise ConfigError(
                f"{type(self).__name__}: init='eva' is defined for linear layers, and {path!r} is an {kind}; use "
                "another init, or leave it out of the targets."
            )


def check_host(path: str, host: nn.Module) -> None:
    """Raise where a host is an embedding that rewrites its weight in each forward."""
    if getattr(host, "max_norm", None) is not None:
        raise TargetError(
            f"{path!r} is an embedding with max_norm, which rewrites its weight in each forward; leave it out."
        )


def check_rank(owner: str, path: str, shape: tuple[int, int], r: int, *, setting: str = "r", remedy: str) -> None:
    """Raise ConfigError where a rank is larger than the smaller side of a weight, `(out, in)`."""
    num_out, num_in = shape
    if r > min(num_out, num_in):
        raise ConfigError(
            f"{owner}: {setting}={r} is larger than {path!r} allows: its weight is {num_out} x {num_in}, so "
            f"{setting} is at most {min(num_out, num_in)}. {remedy}"
        )
