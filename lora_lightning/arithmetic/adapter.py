"""An adapter as a set of low-rank updates by the paths of their layers, read off PEFT's config and tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_lightning.arithmetic.factors import Factors
from lora_lightning.checkpoint.base_sample import BaseSample
from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.config import PeftConfig
from lora_lightning.peft_format.keys import ADALORA, LORA, Spelling
from lora_lightning.peft_format.kinds.adalora import EPSILON, AdaLoraConfig
from lora_lightning.peft_format.lora.config import LoraConfig
from lora_lightning.peft_format.lora.parameters import AdaptedParameter, own_names
from lora_lightning.peft_format.names import PREFIX
from lora_lightning.peft_format.schema.targets import TargetConfig

_EMBEDDING = re.compile(r"(.+)\.lora_embedding_[AB](?:\.[^.]+)?")
_ORIGINAL = re.compile(r".+\.(?:original_module\..+|trainable_tokens_original.*)")
_FACTOR_NAMES = ("lora_A", "lora_B")
_MERGE_FIRST = "merge it into its base first (lora-lightning merge)"


@dataclass(frozen=True)
class Layer:
    """The update of one layer, and how PEFT's files spell its factors.

    Args:
        factors: The update, its scaling folded into B.
        scaling: The scaling.
        is_embedding: Whether the layer is an embedding.
        kernel: The kernel's size of a convolution, else empty.
        is_parameter: Whether it is a single parameter and not a layer.
        dtype: In which the factors were stored.
    """

    factors: Factors
    scaling: float
    is_embedding: bool = False
    kernel: tuple[int, ...] = ()
    is_parameter: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class LowRankAdapters:
    """All low-rank updates of one adapter, and what is kept beside them.

    Args:
        source: Where it came from, for messages.
        layers: The updates by the paths of their layers or parameters.
        rest: Every other tensor by PEFT's key: trained copies (heads), and parts of the base that were not trained.
        copies: Paths of the modules that are trained as copies.
        targets: Which layers it takes, by PEFT's rules.
        base_fingerprint: Digest of the base under the adapter, or None where it is unknown.
        base_sample: A few values of the base, or None.
        facts: What is known of the run.
        files: Further files by name, such as the tokenizer's.
        corrects_quantization: Whether the update started at LoftQ's correction of the error of quantizing.
    """

    source: str
    layers: dict[str, Layer]
    rest: dict[str, Tensor]
    copies: list[str]
    targets: TargetConfig
    base_fingerprint: str | None = None
    base_sample: BaseSample | None = None
    facts: RunFacts = field(default_factory=RunFacts)
    files: Mapping[str, bytes] = field(default_factory=dict)
    corrects_quantization: bool = False


def read_layers(config: PeftConfig, tensors: Mapping[str, Tensor], source: str, **known: Any) -> LowRankAdapters:  # noqa: ANN401 - fields of the result
    """Return the updates that a config and tensors of PEFT describe.

    Args:
        config: What `adapter_config.json` says.
        tensors: The tensors by PEFT's keys.
        source: Where they came from, for messages.
        **known: Further fields of the result.

    Raises:
        CheckpointError: They describe something else than low-rank updates beside the base's weights.
    """
    if isinstance(config, LoraConfig):
        _refuse_more_than_updates(config, source)
        own, rest = _sort(tensors, LORA)
        layers = _lora_layers(config, own, tensors, source)
    elif isinstance(config, AdaLoraConfig):
        own, rest = _sort(tensors, ADALORA)
        layers = _adalora_layers(config, own, source)
    else:
        kind = type(config).__name__.removesuffix("Config")
        raise CheckpointError(
            f"{source} is an adapter of the kind {kind}, whose file alone does not "
            "describe a low-rank update of weights. Only LoRA and its relatives can be added or cut."
        )
    if not layers:
        raise CheckpointError(f"{source} holds no low-rank update, so there is nothing to add or cut.")
    assert isinstance(config, TargetConfig)
    copies = _copied(config, rest)
    return LowRankAdapters(source=source, layers=layers, rest=rest, copies=copies, targets=config, **known)


def _refuse_more_than_updates(config: LoraConfig, source: str) -> None:
    """Refuse a LoRA that changes the base by more than updates of weights.

    Raises:
        CheckpointError: It does.
    """
    if config.use_dora:
        raise CheckpointError(
            f"{source} is DoRA: its magnitudes multiply the base's weights and do not add, nor does a cut of B A keep "
            f"its norms. Instead, {_MERGE_FIRST}, or train it as LoRA."
        )
    extra = {
        f"bias={config.bias!r}": config.bias != "none",
        "lora_bias=True": config.lora_bias,
        "trainable_token_indices": config.token_indices is not None,
    }
    found = [name for name, is_set in extra.items() if is_set]
    if found:
        raise CheckpointError(
            f"{source} has {' and '.join(found)}: it also trained biases or rows of embeddings, of which its file "
            f"holds the values and not the changes, so they do not add. Instead, {_MERGE_FIRST}, or train without them."
        )


def _sort(tensors: Mapping[str, Tensor], spellings: Sequence[Spelling]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapter's own tensors by our names, and the others by PEFT's keys."""
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        if _ORIGINAL.fullmatch(path):
            continue
        matches = ((spelling, re.fullmatch(spelling.pattern, path)) for spelling in spellings)
        found = next(((spelling, match) for spelling, match in matches if match), None)
        if found is None:
            rest[key] = tensor
        else:
            spelling, match = found
            own[match.expand(spelling.name)] = spelling.convert(tensor)
    return own, rest


def _lora_layers(
    config: LoraConfig, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Layer]:
    parameters = [AdaptedParameter(path=path, target=path) for path in config.target_parameters]
    ranks = {one.path: config.rank_and_alpha(one.path)[0] for one in parameters}
    named = own_names(own, parameters, ranks, dict.fromkeys(ranks, 3))
    unknown = [path for path in ranks if f"{path}.lora_A" not in named]
    if unknown:
        raise CheckpointError(
            f"{source} adapts parameters by the ends of their paths ({', '.join(unknown[:3])}), which only the model "
            "completes. Pass the base as `model`, or load it with `load_peft` and write it with `export_peft`."
        )
    kernels, embeddings = _shapes(tensors)
    layers: dict[str, Layer] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in named):
        a, b = _pair(named, path, source)
        rank, alpha = config.rank_and_alpha(path)
        if a.shape[-2] != rank:
            raise CheckpointError(
                f"{source}: A of {path!r} has rank {a.shape[-2]}, and its config says {rank}; get the adapter again."
            )
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        layers[path] = Layer(
            factors=Factors.of(a, b, scaling),
            scaling=scaling,
            is_embedding=path in embeddings,
            kernel=kernels.get(path, ()),
            is_parameter=path in ranks,
            dtype=torch.promote_types(a.dtype, torch.float32),
        )
    return layers


def _adalora_layers(config: AdaLoraConfig, own: Mapping[str, Tensor], source: str) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in own):
        a, b = _pair(own, path, source)
        scaling = config.alpha / (config.init_r + EPSILON)
        values = own.get(f"{path}.lora_E")
        if values is None or len(values) != len(a):
            raise CheckpointError(f"{source}: E of {path!r} does not fit A {list(a.shape)}; get the adapter again.")
        dtype = torch.promote_types(a.dtype, torch.float32)
        layers[path] = Layer(Factors.of(values.double()[:, None] * a, b, scaling), scaling, dtype=dtype)
    return layers


def _pair(named: Mapping[str, Tensor], path: str, source: str) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer.

    Raises:
        CheckpointError: One is missing, or they do not fit.
    """
    missing = [name for name in _FACTOR_NAMES if f"{path}.{name}" not in named]
    if missing:
        raise CheckpointError(f"{source} holds no {missing[0]} for {path!r}; get the adapter again.")
    a, b = (named[f"{path}.{name}"] for name in _FACTOR_NAMES)
    if a.dim() != b.dim() or a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        raise CheckpointError(
            f"{source}: A {list(a.shape)} and B {list(b.shape)} of {path!r} do not fit; get the adapter again."
        )
    return a, b


def _shapes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the kernels of convolutions by their paths, and the paths of embeddings."""
    kernels: dict[str, tuple[int, ...]] = {}
    embeddings: set[str] = set()
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        if match := _EMBEDDING.fullmatch(path):
            embeddings.add(match[1])
        elif (match := re.fullmatch(LORA[0].pattern, path)) and match[2] == "lora_A" and tensor.dim() > 2:
            kernels[match[1]] = tuple(tensor.shape[2:])
    return kernels, embeddings


def _copied(config: PeftConfig, rest: Mapping[str, Tensor]) -> list[str]:
    """Return the paths of the modules that are trained as copies, by the keys of their tensors.

    A classifier's head is in the file of every adapter of its `task_type`; it was trained if the config names it.
    """
    names = tuple(config.modules_to_save)
    found: dict[str, None] = {}
    for key in rest:
        parts = key.removeprefix(PREFIX).split(".")
        starts = (".".join(parts[:end]) for end in range(1, len(parts)))
        module = next((start for start in starts if start.endswith(names)), None)
        if module is not None:
            found[module] = None
    return list(found)
