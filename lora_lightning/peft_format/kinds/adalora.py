"""AdaLoRA in PEFT's format: A, B and E of each host, with the remaining ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.weights import HostKind, codec_of
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import AdaLoRA
from lora_lightning.methods.adalora import AdaLoRAAdapter
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.hosts import (
    check_hosts,
    copied_paths,
    expected_hosts,
    own_modules,
    refuse_different,
)
from lora_lightning.peft_format.keys import ADALORA, sort_tensors
from lora_lightning.peft_format.kinds.tokens import read_listed_tokens
from lora_lightning.peft_format.lora.config import LORA_FIELDS, refuse_changed_base
from lora_lightning.peft_format.names import PEFT_WEIGHTS_NAME, PREFIX, base_state, module_paths, target_modules
from lora_lightning.peft_format.schema.fields import (
    TARGETS,
    Field,
    is_count,
    is_number,
    is_share,
    is_whole,
    read_fields,
    refuse_unknown,
)
from lora_lightning.peft_format.schema.targets import TargetConfig, in_lists
from lora_lightning.peft_format.trained_base import Beside, read_base, read_biases

EPSILON = 1e-5  # what PEFT adds to the rank that it divides by


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(TargetConfig):
    """The part of PEFT's `AdaLoraConfig` that this library computes; for each field see there.

    Args:
        target_r: Rank at the end, an average.
        init_r: Rank at the start.
        alpha: `lora_alpha`.
        dropout: `lora_dropout`.
        t_init: `tinit`.
        t_final: `tfinal`.
        delta_t: `deltaT`.
        beta1: `beta1`.
        beta2: `beta2`.
        orthogonality_weight: `orth_reg_weight`.
        kept: Which triplets of a host remain, by `<path>.lora_E`.
        bias: `none`, or whose biases of the base were trained.
        token_indices: Rows trained of the input embeddings, or by the endings of embeddings' paths; None for none.
    """

    target_r: int
    init_r: int
    alpha: float
    dropout: float
    t_init: int
    t_final: int
    delta_t: int
    beta1: float
    beta2: float
    orthogonality_weight: float
    kept: dict[str, list[bool]]
    bias: str
    token_indices: list[int] | dict[str, list[int]] | None


def parse_adalora(data: Mapping[str, Any], source: str) -> AdaLoraConfig:
    """Check the content of an `adapter_config.json` of AdaLoRA.

    Raises:
        CheckpointError: A value is missing, of the wrong kind, or an option that this library does not compute.
    """
    refuse_changed_base(data, source)
    ignored = {"r", "alpha_pattern", "use_rslora", "total_step", "init_lora_weights", "loftq_config"}
    refuse_unknown(data, {*_FIELDS, *ignored}, "AdaLoRA on modules", source)
    config = AdaLoraConfig(**in_lists(read_fields(data, _FIELDS, source)))
    config.check_patterns(source)
    return config


def fit_adalora(model: nn.Module, config: AdaLoraConfig, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Convert an AdaLoRA for one model; see `fit_to_model`."""
    modules = own_modules(model)
    saved = copied_paths(modules, config, tensors)
    found = sort_tensors(tensors, ADALORA, saved, base_state(model).keys(), f"{source}/{PEFT_WEIGHTS_NAME}")
    hosts = expected_hosts(modules, config, found.hosts, view_of(model))
    check_hosts(hosts, found.hosts)
    refuse_different(model, [*hosts, *saved], source)
    state: dict[str, Tensor] = {}
    for path in hosts:
        state |= _padded(path, found.own, config, source)
    biases = {name: tensor for name, tensor in found.base.items() if name.endswith(".bias") and config.bias != "none"}
    rest = {name: tensor for name, tensor in found.base.items() if name not in biases}
    parts = (
        read_biases(model, biases, {}, saved, source),
        read_base(model, rest, hosts, source),
        read_listed_tokens(model, config.token_indices, found, source),
    )
    method = _method(config, modules, hosts, [path for path in saved if any(_in(path, key) for key in found.copies)])
    beside = Beside.of(parts)
    return FittedAdapter(methods=(method, *beside.methods), state={**state, **found.copies, **beside.state})


def _in(path: str, key: str) -> bool:
    return key.startswith(f"{path}.")


def _method(config: AdaLoraConfig, modules: Mapping[str, nn.Module], hosts: list[str], saved: list[str]) -> AdaLoRA:
    sides = [min(codec_of(modules[path]).shape(modules[path])) for path in hosts]
    return AdaLoRA(
        target_r=min(config.target_r, config.init_r),
        init_r=config.init_r,
        alpha=config.alpha,
        dropout=config.dropout,
        t_init=config.t_init or None,
        t_final=config.t_final or None,
        delta_t=config.delta_t,
        beta1=config.beta1,
        beta2=config.beta2,
        orthogonality_weight=config.orthogonality_weight,
        wide_ranks=config.init_r > min(sides),
        target_modules=target_modules(list(modules), hosts),
        modules_to_save=saved or None,
    )


def _padded(path: str, own: Mapping[str, Tensor], config: AdaLoraConfig, source: str) -> dict[str, Tensor]:
    """Return A, B and E of a host at the initial rank: a pruned triplet has E = 0."""
    names = [f"{path}.lora_{part}" for part in "ABE"]
    missing = [name for name in names if name not in own]
    if missing:
        raise CheckpointError(f"{source} holds no {missing[0]!r}; get the adapter again.")
    a, b, e = (own[name] for name in names)
    rank, kept = len(e), config.kept.get(f"{path}.lora_E")
    index = [at for at, is_kept in enumerate(kept or []) if is_kept]
    if len(index) != rank or len(kept or []) != config.init_r:
        index = list(range(rank))
    if rank > config.init_r or len(a) != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{source}: A {list(a.shape)}, B {list(b.shape)} and E [{rank}] of {path!r} do not fit init_r="
            f"{config.init_r}; get the adapter again."
        )
    full_a, full_b = a.new_zeros(config.init_r, a.shape[1]), b.new_zeros(len(b), config.init_r)
    full_e = e.new_zeros(config.init_r)
    full_a[index], full_b[:, index] = a, b
    full_e[index] = e * (config.init_r / (config.init_r + EPSILON))
    return dict(zip(names, (full_a, full_b, full_e), strict=True))


def encode_adalora(model: nn.Module, method: AdaLoRA, adapters: Mapping[str, AdaLoRAAdapter]) -> tuple[Any, Any]:
    """Return config and tensors of AdaLoRA's adapters, by their hosts' paths; see `encode`."""
    r = method.start_rank
    t_init, t_final = method.t_init or 0, method.t_final or 0
    config = {
        "peft_type": "ADALORA",
        "target_modules": target_modules(module_paths(model), list(adapters)),
        "target_r": method.target_r,
        "init_r": r,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "tinit": t_init,
        "tfinal": t_final,
        "total_step": t_init + t_final + 1,  # PEFT wants one; how long a run was is not a property of an adapter
        "deltaT": method.delta_t,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "orth_reg_weight": method.orthogonality_weight,
        "bias": "none",
    }
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        # PEFT starts all hosts with the same rank; `all-linear` caps that of a narrow one here.
        missing = r - adapter.r
        tensors[f"{PREFIX}{path}.lora_A"] = F.pad(adapter.lora_A, (0, 0, 0, missing))
        tensors[f"{PREFIX}{path}.lora_B"] = F.pad(adapter.lora_B, (0, missing))
        tensors[f"{PREFIX}{path}.lora_E"] = F.pad(adapter.lora_E, (0, missing))[:, None] * ((r + EPSILON) / r)
    return config, {name: tensor.detach() for name, tensor in tensors.items()}


def why_no_adalora(host: nn.Module) -> str | None:
    """Return why PEFT has no AdaLoRA for a host, as the end of a sentence, or None."""
    kind = codec_of(host).kind
    is_matrix = kind is HostKind.LINEAR or (kind is HostKind.CONV and isinstance(host, nn.Conv2d))
    return None if is_matrix else f"PEFT's AdaLoRA takes no {kind}"


def _is_masks(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(mask, list) and all(isinstance(one, bool) for one in mask) for mask in value.values()
    )


_FIELDS = {
    **TARGETS,
    **{name: LORA_FIELDS[name] for name in ("lora_alpha", "lora_dropout", "bias", "trainable_token_indices")},
    "target_r": Field("target_r", "a whole number from 1", is_count, 8),
    "init_r": Field("init_r", "a whole number from 1", is_count, 12),
    "tinit": Field("t_init", "a whole number from 0", is_whole, 0),
    "tfinal": Field("t_final", "a whole number from 0", is_whole, 0),
    "deltaT": Field("delta_t", "a whole number from 1", is_count, 1),
    "beta1": Field("beta1", "a number above 0 and below 1", is_share, 0.85),
    "beta2": Field("beta2", "a number above 0 and below 1", is_share, 0.85),
    "orth_reg_weight": Field(
        "orthogonality_weight", "a number from 0", lambda value: value == 0 or is_number(value), 0.5
    ),
    "rank_pattern": Field("kept", "an object of lists of true and false", _is_masks, {}),
}
