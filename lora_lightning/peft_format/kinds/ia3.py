"""IA3 in PEFT's format: one vector of scales for each host, on its output or on its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.weights import HostKind, find_codec
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import IA3
from lora_lightning.methods.ia3 import ScaledInput, ScaledOutput
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.hosts import check_hosts, copied_paths, expected_hosts, own_modules, refuse_different
from lora_lightning.peft_format.keys import IA3 as SPELLINGS
from lora_lightning.peft_format.keys import sort_tensors
from lora_lightning.peft_format.names import PEFT_WEIGHTS_NAME, PREFIX, any_of, base_state, module_paths, target_modules
from lora_lightning.peft_format.schema.fields import TARGETS, Field, is_names_or_text, read_fields, refuse_unknown
from lora_lightning.peft_format.schema.targets import TargetConfig, in_lists, match
from lora_lightning.peft_format.trained_base import read_base


@dataclass(frozen=True, kw_only=True)
class Ia3Config(TargetConfig):
    """The part of PEFT's `IA3Config` that this library computes; for each field see there.

    Args:
        feedforward_modules: The targets whose input is scaled.
    """

    feedforward_modules: list[str] | str | None

    def scales_input(self, path: str) -> bool:
        """Return whether the input of a target is scaled, by PEFT's rule: a name may end in the middle of a part."""
        names = self.feedforward_modules
        if isinstance(names, str):
            return match(names, path, whole=True) is not None
        return any(path.endswith(name) for name in names or ())


_FIELDS = {
    **TARGETS,
    "feedforward_modules": Field("feedforward_modules", "a list of names, a text or null", is_names_or_text, None),
}


def parse_ia3(data: Mapping[str, Any], source: str) -> Ia3Config:
    """Check the content of an `adapter_config.json` of IA3.

    Raises:
        CheckpointError: A value is of the wrong kind, or an option that this library does not compute.
    """
    refuse_unknown(data, {*_FIELDS, "init_ia3_weights"}, "IA3", source)
    config = Ia3Config(**in_lists(read_fields(data, _FIELDS, source)))
    others = [config.feedforward_modules] if isinstance(config.feedforward_modules, str) else []
    config.check_patterns(source, others)
    return config


def fit_ia3(model: nn.Module, config: Ia3Config, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Convert an IA3 for one model; see `fit_to_model`."""
    modules, view = own_modules(model), view_of(model)
    saved = copied_paths(modules, config, tensors)
    found = sort_tensors(tensors, SPELLINGS, saved, base_state(model).keys(), f"{source}/{PEFT_WEIGHTS_NAME}")
    hosts = expected_hosts(modules, config, found.hosts, view)
    check_hosts(hosts, found.hosts)
    refuse_different(model, [*hosts, *saved], source)
    for path in hosts:
        codec = find_codec(modules[path])
        if codec is None or codec.kind is not HostKind.LINEAR:
            raise CheckpointError(
                f"{source} scales {path!r}, a {type(modules[path]).__name__}, and IA3 of this library scales linear "
                "layers; merge it with PEFT."
            )
    beside = read_base(model, found.base, hosts, source)
    inputs = [path for path in hosts if config.scales_input(path)]
    outputs = [path for path in hosts if path not in inputs]
    paths = list(modules)
    method = IA3(
        target_modules=target_modules(paths, outputs) if outputs else [],
        feedforward_modules=target_modules(paths, inputs) if inputs else [],
        scale_queries=any(view.query_share(path) for path in outputs),
        modules_to_save=[path for path in saved if any(key.startswith(f"{path}.") for key in found.copies)] or None,
    )
    state = {**found.own, **found.copies, **beside.state}
    return FittedAdapter(methods=(method, *beside.methods), state=state)


def encode_ia3(
    model: nn.Module, method: IA3, adapters: Mapping[str, ScaledInput | ScaledOutput]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of IA3's adapters, by their hosts' paths; see `encode`."""
    del method
    inputs = [path for path, adapter in adapters.items() if isinstance(adapter, ScaledInput)]
    hosts = list(adapters)
    config = {
        "peft_type": "IA3",
        "target_modules": target_modules(module_paths(model), hosts),
        "feedforward_modules": _feedforward(inputs, hosts),
    }
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        scales = adapter.ia3_l[None] if isinstance(adapter, ScaledInput) else adapter.scales()[:, None]
        tensors[f"{PREFIX}{path}.ia3_l"] = scales.detach()
    return config, tensors


def _feedforward(inputs: list[str], hosts: list[str]) -> list[str] | str:
    """Return the hosts whose input is scaled, with names that match only these by PEFT's loose rule for a list."""
    others = [host for host in hosts if host not in inputs]
    is_loose = any(host.endswith(tuple(inputs)) for host in others) if inputs else False
    return any_of(inputs) if is_loose else inputs
