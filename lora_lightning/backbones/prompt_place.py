"""Where transformers models take their tokens."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lora_lightning.adapters.view import PromptPlace
from lora_lightning.errors import TargetError

_COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
_WITHOUT = ("deberta-v2", "mpnet", "bloom")
"""Model types whose body does not take positions or masks the way soft prompts need."""


def find_prompt_place(model: Any) -> PromptPlace:  # noqa: ANN401 - a transformers model
    """Return the module of a transformers model that takes its tokens.

    Raises:
        TargetError: The architecture is not supported, or the model takes no tokens.
    """
    config = model.config
    if config.model_type in _WITHOUT:
        raise TargetError(
            f"Soft prompts do not work on {config.model_type}: its positions are tied to the tokens' places. Use LoRA "
            "or another method."
        )
    base = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    is_pair = bool(config.is_encoder_decoder) and hasattr(model, "get_encoder")
    body = base.get_encoder() if is_pair else base
    embedding = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    arguments = tuple(inspect.signature(type(body).forward).parameters)[1:]
    if not isinstance(embedding, nn.Embedding) or "inputs_embeds" not in arguments:
        raise TargetError(f"{type(model).__name__} takes no token embeddings, so soft prompts do not work on it.")
    decoder = base.get_decoder() if is_pair and hasattr(base, "get_decoder") else None
    text = config.get_text_config()
    offset = (text.pad_token_id or 0) + 1 if config.model_type in _COUNTS_FROM_PADDING else 0
    limit = getattr(text, "max_position_embeddings", None)
    return PromptPlace(
        body=path_of(model, body),
        embedding=path_of(body, embedding),
        arguments=tuple(name for name in arguments if name != "kwargs"),
        position_offset=offset,
        max_positions=None if limit is None else limit - offset,
        decoder=None if decoder is None or decoder is body else path_of(model, decoder),
    )


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Return the path of a module inside a model; empty for the model itself."""
    return next(path for path, module in model.named_modules() if module is wanted)
