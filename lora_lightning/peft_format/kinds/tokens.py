"""Trainable tokens in PEFT's format: the rows, and the ids of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.targets import has_suffix
from lora_lightning.adapters.view import input_embeddings
from lora_lightning.adapters.walk import join
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import TrainableTokens
from lora_lightning.methods.trainable_tokens import TrainableTokensAdapter
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.hosts import copied_paths, own_modules, refuse_different, tied_to
from lora_lightning.peft_format.keys import SortedTensors, sort_tensors
from lora_lightning.peft_format.names import PEFT_WEIGHTS_NAME, PREFIX, base_state, module_paths, target_modules
from lora_lightning.peft_format.schema.fields import (
    COMMON,
    Field,
    is_names_or_text,
    is_wholes,
    read_fields,
    refuse_unknown,
)
from lora_lightning.peft_format.schema.targets import PeftConfig
from lora_lightning.peft_format.trained_base import Beside, first_holder, read_base


@dataclass(frozen=True, kw_only=True)
class TokensConfig(PeftConfig):
    """The part of PEFT's `TrainableTokensConfig` that this library computes.

    Args:
        token_indices: The tokens, in the order of the rows.
        target_modules: The embeddings; the tensors' names say which they are.
    """

    token_indices: list[int]
    target_modules: list[str] | str | None


_FIELDS = {
    **COMMON,
    "token_indices": Field("token_indices", "a list of token ids", is_wholes),
    "target_modules": Field("target_modules", "a list of names, a text or null", is_names_or_text, None),
}


def parse_tokens(data: Mapping[str, Any], source: str) -> TokensConfig:
    """Check the content of an `adapter_config.json` of trainable tokens.

    Raises:
        CheckpointError: A value is missing, of the wrong kind, or an option that this library does not compute.
    """
    refuse_unknown(data, {*_FIELDS, "init_weights"}, "trainable tokens", source)
    return TokensConfig(**read_fields(data, _FIELDS, source))


def fit_tokens(model: nn.Module, config: TokensConfig, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Convert trained rows of embeddings for one model; see `fit_to_model`."""
    modules = own_modules(model)
    saved = copied_paths(modules, config, tensors)
    found = sort_tensors(tensors, (), saved, base_state(model).keys(), f"{source}/{PEFT_WEIGHTS_NAME}")
    if not found.tokens:
        raise CheckpointError(
            f"{source}/{PEFT_WEIGHTS_NAME} holds no trained rows; the file is not an adapter of PEFT."
        )
    refuse_different(model, [*found.tokens, *saved], source)
    saved = [path for path in saved if any(name.startswith(f"{path}.") for name in found.copies)]
    beside = read_tokens(model, dict.fromkeys(found.tokens, config.token_indices), found, source, saved)
    rest = read_base(model, found.base, list(found.tokens), source)
    methods = (*beside.methods, *rest.methods)
    return FittedAdapter(methods=methods, state={**beside.state, **rest.state, **found.copies})


def read_tokens(
    model: nn.Module,
    indices: Mapping[str, list[int]],
    found: SortedTensors,
    source: str,
    saved: list[str] | None = None,
) -> Beside:
    """Return the individually trained rows of embeddings; modules that share a weight share its rows.

    Args:
        model: The bare model.
        indices: The tokens of each embedding, by its path.
        found: The tensors.
        source: Where the adapter came from, for messages.
        saved: Modules that are also trained as copies.

    Raises:
        CheckpointError: Tokens and rows of an embedding do not match, or the model has no such embedding.
    """
    beside, done = Beside(), set[str]()
    for path, rows in found.tokens.items():
        ids = indices.get(path, [])
        if len(ids) != len(rows) or path not in own_modules(model):
            raise CheckpointError(
                f"{source} holds {len(rows)} trained rows of {path!r}, and its config names {len(ids)} tokens for it "
                "on this model; load the base that it was trained on, or get the adapter again."
            )
        reason = why_other_tokens(model, path)
        if reason is not None:
            raise CheckpointError(f"{source} trains rows of {path!r}, and {reason}; use it in PEFT.")
        holder = first_holder(model, path)
        _refuse_other_rows(model, path, indices, found, source)
        if holder not in done:
            beside.add_tokens(model, path, ids, rows, saved or None)
        done.add(holder)
    return beside


def _refuse_other_rows(
    model: nn.Module, path: str, indices: Mapping[str, list[int]], found: SortedTensors, source: str
) -> None:
    """Refuse rows that differ between modules that share a weight, or that the input embeddings lack."""
    alike = [path, *tied_to(own_modules(model), [path])]
    has_input = len(alike) == 1 or input_path(model) in found.tokens
    others = [one for one in alike if one in found.tokens]
    is_same = all(
        indices.get(one) == indices.get(path) and torch.equal(found.tokens[one], found.tokens[path]) for one in others
    )
    if not has_input or not is_same:
        raise CheckpointError(
            f"{source} trains rows of {' and '.join(map(repr, others))}, which share a weight with this model's input "
            "embeddings and have other rows than these; use it in PEFT."
        )


def read_listed_tokens(
    model: nn.Module, named: list[int] | dict[str, list[int]] | None, found: SortedTensors, source: str
) -> Beside:
    """Return the rows of embeddings that were trained with an adapter, by its `trainable_token_indices`."""
    indices: dict[str, list[int]] = {}
    for path in found.tokens:
        by_name = named if isinstance(named, dict) else {path: named or []}
        indices[path] = next((ids for name, ids in by_name.items() if has_suffix(path, name)), [])
    return read_tokens(model, indices, found, source)


def input_path(model: nn.Module) -> str | None:
    """Return the path of a model's input embeddings, or None if unknown."""
    embedding = input_embeddings(model)
    return next((path for path, module in own_modules(model).items() if module is embedding), None)


def named_holder(model: nn.Module, path: str) -> str:
    """Return the one of the modules that share a weight whose rows PEFT gives to all: the input embeddings, if any."""
    alike = [path, *tied_to(own_modules(model), [path])]
    inputs = input_path(model)
    return inputs if inputs in alike else first_holder(model, path)


def why_other_tokens(model: nn.Module, path: str) -> str | None:
    """Return why PEFT computes something else with trained rows of an embedding, as the end of a sentence, or None."""
    modules = own_modules(model)
    others = tied_to(modules, [path])
    tied = [modules[other] for other in others]
    is_input = input_path(model) in [path, *others]
    if tied and not (is_input and getattr(getattr(model, "config", None), "tie_word_embeddings", False)):
        return "PEFT gives them to modules that share a weight only where its config ties the input embeddings"
    if any(isinstance(module, nn.Linear) and module.bias is not None for module in [modules[path], *tied]):
        return "PEFT leaves out the bias of an output layer that shares them"
    return None


def namesakes(model: nn.Module, path: str) -> list[str]:
    """Return the other modules that PEFT wraps beside a LoRA for the rows of an embedding.

    It compares ends of paths, dot or no dot: `word_embeddings` names `encoder.word_embeddings` too.
    """
    holder = named_holder(model, path)
    return [other for other in module_paths(model) if other != holder and other.endswith(holder)]


def tied_namesakes(model: nn.Module, path: str) -> list[str]:
    """Return the namesakes that share the embedding's weight, for each of which PEFT reads the rows again."""
    tied = tied_to(own_modules(model), [named_holder(model, path)])
    return [other for other in namesakes(model, path) if other in tied]


def encode_tokens(
    model: nn.Module, method: TrainableTokens, adapters: Mapping[str, TrainableTokensAdapter]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of trained rows, by the paths of the modules that have them; see `encode`."""
    holders = list(dict.fromkeys(named_holder(model, path) for path in adapters))
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": sorted(method.token_indices),
        "target_modules": target_modules(module_paths(model), holders),
    }
    names = {path: join(f"{PREFIX}{path}", "trainable_tokens_delta") for path in adapters}
    return config, {names[path]: adapter.rows.tokens.detach() for path, adapter in adapters.items()}
