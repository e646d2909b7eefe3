"""Prompt tuning and P-tuning in PEFT's format: the virtual tokens, which PEFT keeps outside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lora_lightning.adapters.view import PromptPlace
from lora_lightning.adapters.walk import join, unwrap
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import PromptTuning, PTuning
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.hosts import copied_paths, own_modules
from lora_lightning.peft_format.keys import sort_tensors
from lora_lightning.peft_format.names import PEFT_WEIGHTS_NAME, base_state
from lora_lightning.peft_format.schema.fields import (
    COMMON,
    Field,
    is_count,
    is_share,
    is_text,
    read_fields,
    refuse_unknown,
)
from lora_lightning.peft_format.schema.targets import PeftConfig
from lora_lightning.peft_format.trained_base import read_base

KEY = "prompt_embeddings"
ROOT = "base_model."
_Kind = Literal["PROMPT_TUNING", "P_TUNING"]

# PEFT's wrapper by the end of the model's class: prompt methods work through these alone.
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForSequenceClassification": "SEQ_CLS",
}
_POOLED = "PEFT pools a virtual token where this library pools the first real one"
_LAST = "PEFT pools the last position of a row, be it padding, where this library pools the last real token"
_SIZES = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


@dataclass(frozen=True, kw_only=True)
class PromptConfig(PeftConfig):
    """The part of PEFT's configs for prompt tuning and P-tuning that this library computes.

    Args:
        kind: `PROMPT_TUNING` or `P_TUNING`.
        num_virtual_tokens: Number of virtual tokens.
        encoder: The encoder of P-tuning, `MLP` or `LSTM`.
        encoder_hidden_size: Its width, or None.
        encoder_num_layers: Its layers.
        encoder_dropout: Its dropout.
    """

    kind: _Kind
    num_virtual_tokens: int
    encoder: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0


SIZES = {
    **COMMON,
    "num_virtual_tokens": Field("num_virtual_tokens", "a whole number from 1", is_count),
}
_ENCODER = {
    **SIZES,
    "encoder_reparameterization_type": Field("encoder", "MLP or LSTM", is_text, "MLP"),
    "encoder_hidden_size": Field("encoder_hidden_size", "a whole number from 1", is_count, None),
    "encoder_num_layers": Field("encoder_num_layers", "a whole number from 1", is_count, 2),
    "encoder_dropout": Field("encoder_dropout", "a number from 0 and below 1", is_share, 0.0),
}


def parse_prompt_tuning(data: Mapping[str, Any], source: str) -> PromptConfig:
    """Check the content of an `adapter_config.json` of prompt tuning.

    Raises:
        CheckpointError: A value is missing, of the wrong kind, or an option that this library does not compute.
    """
    starts = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    refuse_unknown(data, {*SIZES, *_SIZES, *starts}, "prompt tuning", source)
    return PromptConfig(kind="PROMPT_TUNING", **read_fields(data, SIZES, source))


def parse_p_tuning(data: Mapping[str, Any], source: str) -> PromptConfig:
    """Check the content of an `adapter_config.json` of P-tuning.

    Raises:
        CheckpointError: A value is missing, of the wrong kind, or an option that this library does not compute.
    """
    refuse_unknown(data, {*_ENCODER, *_SIZES}, "P-tuning", source)
    return PromptConfig(kind="P_TUNING", **read_fields(data, _ENCODER, source))


def fit_prompt(model: nn.Module, config: PromptConfig, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Convert virtual tokens for one model; see `fit_to_model`."""
    refuse_pooled(model, source)
    place = view_of(model).prompt_place()
    rows, copies = split_tensors(model, config, tensors, source)
    width = model.get_submodule(join(place.body, place.embedding)).embedding_dim
    # For an encoder-decoder PEFT keeps as many again for the decoder, which it never uses.
    if rows.dim() != 2 or rows.shape[1] != width or rows.shape[0] % config.num_virtual_tokens:
        raise CheckpointError(
            f"{source}/{PEFT_WEIGHTS_NAME}: {KEY} is {list(rows.shape)}, and virtual tokens of this model are "
            f"[{config.num_virtual_tokens}, {width}]; load the base that it was trained on."
        )
    prompt = rows[: config.num_virtual_tokens]
    method = _method(config, copied_modules(model, copies))
    return FittedAdapter(methods=(method,), state={join(place.body, "prompt"): prompt, **copies})


def _method(config: PromptConfig, saved: list[str]) -> PromptTuning | PTuning:
    if config.kind == "PROMPT_TUNING":
        return PromptTuning(num_virtual_tokens=config.num_virtual_tokens, modules_to_save=saved or None)
    return PTuning(
        num_virtual_tokens=config.num_virtual_tokens,
        modules_to_save=saved or None,
        encoder="lstm" if config.encoder.upper() == "LSTM" else "mlp",
        encoder_hidden_size=config.encoder_hidden_size,
        encoder_num_layers=config.encoder_num_layers,
        encoder_dropout=config.encoder_dropout,
    )


def split_tensors(
    model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor], source: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the virtual tokens of a file, and the tensors of copies by our names.

    Args:
        model: The bare model.
        config: The adapter's config.
        tensors: The file's tensors by its keys.
        source: Where the adapter came from, for messages.

    Raises:
        CheckpointError: There are others, or no virtual tokens.
    """
    if KEY not in tensors:
        raise CheckpointError(f"{source}/{PEFT_WEIGHTS_NAME} holds no {KEY!r}; get the adapter again.")
    # A prompt method of PEFT wraps no model inside the model, so that its prefix is shorter.
    others = {key.removeprefix(ROOT): tensor for key, tensor in tensors.items() if key != KEY}
    saved = copied_paths(own_modules(model), config, others)
    found = sort_tensors(others, (), saved, base_state(model).keys(), f"{source}/{PEFT_WEIGHTS_NAME}")
    read_base(model, found.base, saved, source)
    return tensors[KEY], found.copies


def copied_modules(model: nn.Module, copies: Mapping[str, Tensor]) -> list[str]:
    """Return the modules that hold the parameters of copies, outermost first."""
    holders = {name.rpartition(".")[0] for name in copies}
    paths = [path for path in own_modules(model) if path in holders]
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def refuse_pooled(model: nn.Module, source: str) -> None:
    """Refuse models that pool another token with PEFT's virtual tokens than with this library's.

    Raises:
        CheckpointError: The model is one.
    """
    reason = why_other_pooling(model)
    if reason is not None:
        raise CheckpointError(
            f"{source} holds virtual tokens, and {reason}: the two answer differently. Train it again with this "
            "library, or use it in PEFT."
        )


def why_other_pooling(model: nn.Module) -> str | None:
    """Return why PEFT pools another token of a row than this library, as the end of a sentence, or None."""
    model = unwrap(model)
    names = [cls.__name__ for cls in type(model).__mro__]
    body: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
    is_classifier = any(name.endswith(("ForSequenceClassification", "ForMultipleChoice")) for name in names)
    is_bare = not any(name.endswith(tuple(_TASK_TYPES)) for name in names)
    if is_classifier and _reads_last_token(model):
        return f"{_LAST} (on {type(model).__name__})"
    if is_classifier or (is_bare and getattr(body, "pooler", None) is not None):
        return f"{_POOLED} (on {type(model).__name__})"
    return None


def _reads_last_token(model: nn.Module) -> bool:
    """Return whether a classifier reads the last real token of each row, as decoders' do."""
    return isinstance(getattr(model, "score", None), nn.Linear) and not model.config.is_encoder_decoder  # type: ignore[union-attr]  # a config


def task_type_of_prompt(model: nn.Module) -> str | None:
    """Return the `task_type` by which PEFT picks the wrapper that adds virtual tokens, or None where it has none."""
    cls = type(unwrap(model))
    names = [one.__name__ for one in cls.__mro__]
    found = next((kind for ending, kind in _TASK_TYPES.items() if any(name.endswith(ending) for name in names)), None)
    return found or ("FEATURE_EXTRACTION" if cls.__name__.endswith("Model") else None)


def why_no_wrapper(model: nn.Module) -> str | None:
    """Return why PEFT does not support prompt methods on a model, as the end of a sentence, or None."""
    if task_type_of_prompt(model) is not None:
        return None
    name = type(unwrap(model)).__name__
    return f"PEFT's prompt methods work through a wrapper for a task, and it has none for {name}"


def why_no_prompt(model: nn.Module) -> str | None:
    """Return why PEFT cannot use a model's virtual tokens, as the end of a sentence, or None."""
    return why_other_pooling(model) or why_no_wrapper(model)


def encode_prompt(
    model: nn.Module, method: PromptTuning | PTuning, state: Mapping[str, Tensor], place: PromptPlace
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of virtual tokens; see `encode`."""
    prompt = state[join(place.body, "prompt")]
    config = {**sizes_of(model, method.num_virtual_tokens, prompt.shape[1]), "peft_type": "PROMPT_TUNING"}
    if isinstance(method, PTuning):
        config |= {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": method.encoder.upper(),
            "encoder_hidden_size": method.encoder_hidden_size or prompt.shape[1],
            "encoder_num_layers": method.encoder_num_layers,
            "encoder_dropout": method.encoder_dropout,
        }
    else:
        config["prompt_tuning_init"] = "RANDOM"
    return config, {KEY: prompt}


def sizes_of(model: nn.Module, num_virtual_tokens: int, width: int, **others: Any) -> dict[str, Any]:  # noqa: ANN401 - PEFT's own settings
    """Return the model's entries in PEFT's configs of prompt methods."""
    text: Any = unwrap(model).config.get_text_config()  # type: ignore[union-attr, operator]  # a transformers model
    sizes = {
        "num_virtual_tokens": num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(text, "num_attention_heads", 1),
        "num_layers": getattr(text, "num_hidden_layers", 1),
        "task_type": task_type_of_prompt(model),
    }
    return sizes | others
