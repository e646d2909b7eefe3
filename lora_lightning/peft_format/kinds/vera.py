"""VeRA in PEFT's format: two vectors of each host, and the shared pair of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.walk import join
from lora_lightning.adapters.weights import codec_of
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import VeRA
from lora_lightning.methods.vera import SharedProjections, VeRAAdapter
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.hosts import check_hosts, copied_paths, expected_hosts, own_modules, refuse_different
from lora_lightning.peft_format.keys import VERA, sort_tensors
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

_PAIR = ("vera_A", "vera_B")
_ROOT = "base_model."
_TOLERANCE = 1e-6  # the same draw on another machine


@dataclass(frozen=True, kw_only=True)
class VeraConfig(TargetConfig):
    """The part of PEFT's `VeraConfig` that this library computes; for each field see there.

    Args:
        r: Rank.
        d_initial: Start of d.
        dropout: `vera_dropout`.
        projection_seed: `projection_prng_key`.
        bias: `none`, or whose biases of the base were trained.
    """

    r: int
    d_initial: float
    dropout: float
    projection_seed: int
    bias: str


_FIELDS = {
    **TARGETS,
    "r": Field("r", "a whole number from 1", is_count),
    "d_initial": Field("d_initial", "a number above 0", is_number, 0.1),
    "vera_dropout": Field("dropout", "a number from 0 and below 1", is_share, 0.0),
    "projection_prng_key": Field("projection_seed", "a whole number from 0", is_whole, 0),
    "bias": Field("bias", "none, all or vera_only", lambda value: value in ("none", "all", "vera_only"), "none"),
}


def parse_vera(data: Mapping[str, Any], source: str) -> VeraConfig:
    """Check the content of an `adapter_config.json` of VeRA.

    Raises:
        CheckpointError: A value is missing, of the wrong kind, or an option that this library does not compute.
    """
    refuse_unknown(data, {*_FIELDS, "save_projection", "init_weights"}, "VeRA", source)
    config = VeraConfig(**in_lists(read_fields(data, _FIELDS, source)))
    config.check_patterns(source)
    return config


def fit_vera(model: nn.Module, config: VeraConfig, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Convert a VeRA for one model; see `fit_to_model`."""
    modules = own_modules(model)
    pair = {name: one for key, one in tensors.items() if (name := _pair_name(key)) is not None}
    rest = {key: one for key, one in tensors.items() if _pair_name(key) is None}
    saved = copied_paths(modules, config, rest)
    found = sort_tensors(rest, VERA, saved, base_state(model).keys(), f"{source}/{PEFT_WEIGHTS_NAME}")
    hosts = expected_hosts(modules, config, found.hosts, view_of(model))
    check_hosts(hosts, found.hosts)
    refuse_different(model, [*hosts, *saved], source)
    biases = {name: one for name, one in found.base.items() if name.endswith(".bias") and config.bias != "none"}
    rest_of_base = {name: one for name, one in found.base.items() if name not in biases}
    parts = read_biases(model, biases, {}, saved, source), read_base(model, rest_of_base, hosts, source)
    beside = Beside.of(parts)
    projections = _projections(modules, config, hosts)
    is_drawn = _is_drawn(projections, pair, source)
    shared = {"projections.digest": projections.digest}
    if not is_drawn:
        shared |= {"projections.projection_a": pair["vera_A"], "projections.projection_b": pair["vera_B"]}
    method = VeRA(
        r=config.r,
        d_initial=config.d_initial,
        dropout=config.dropout,
        projection_seed=config.projection_seed,
        save_projection=not is_drawn,
        target_modules=target_modules(list(modules), hosts),
        modules_to_save=[path for path in saved if any(key.startswith(f"{path}.") for key in found.copies)] or None,
    )
    state = {join(hosts[0], name): one for name, one in shared.items()}
    return FittedAdapter(
        methods=(method, *beside.methods), state={**found.own, **state, **found.copies, **beside.state}
    )


def _pair_name(key: str) -> str | None:
    """Return which matrix of the shared pair a key names, if any."""
    path = key.removeprefix(_ROOT)
    return next((name for name in _PAIR if path == name or path.startswith(f"{name}.")), None)


def _projections(modules: Mapping[str, nn.Module], config: VeraConfig, hosts: list[str]) -> SharedProjections:
    """Draw the pair that this library draws for these hosts."""
    shapes = [codec_of(modules[path]).shape(modules[path]) for path in hosts]
    return SharedProjections(
        seed=config.projection_seed,
        r=config.r,
        num_in=max(num_in for _, num_in in shapes),
        num_out=max(num_out for num_out, _ in shapes),
        is_saved=False,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def _is_drawn(projections: SharedProjections, pair: Mapping[str, Tensor], source: str) -> bool:
    """Return whether the pair of the file equals the one drawn from its seed; True without a pair.

    Raises:
        CheckpointError: The file's has another shape.
    """
    if len(pair) < len(_PAIR):
        return True
    own = (projections.projection_a, projections.projection_b)
    for name, mine in zip(_PAIR, own, strict=True):
        if pair[name].shape != mine.shape:
            raise CheckpointError(
                f"{source} holds {name} {list(pair[name].shape)}, and its targets on this model need "
                f"{list(mine.shape)}; load the base that it was trained on."
            )
    return all(
        torch.allclose(pair[name].float(), mine, rtol=0, atol=_TOLERANCE) for name, mine in zip(_PAIR, own, strict=True)
    )


def encode_vera(model: nn.Module, method: VeRA, adapters: Mapping[str, VeRAAdapter]) -> tuple[Any, Any]:
    """Return config and tensors of VeRA's adapters, by their hosts' paths; see `encode`."""
    config = {
        "peft_type": "VERA",
        "target_modules": target_modules(module_paths(model), list(adapters)),
        "r": method.r,
        "d_initial": method.d_initial,
        "vera_dropout": method.dropout,
        "projection_prng_key": method.projection_seed,
        "save_projection": True,
        "bias": "none",
    }
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        tensors[f"{PREFIX}{path}.vera_lambda_b"] = adapter.lambda_b
        tensors[f"{PREFIX}{path}.vera_lambda_d"] = adapter.lambda_d
        shared = adapter.projections
        tensors |= {f"{_ROOT}vera_A": shared.projection_a, f"{_ROOT}vera_B": shared.projection_b}
    return config, {name: tensor.detach() for name, tensor in tensors.items()}
