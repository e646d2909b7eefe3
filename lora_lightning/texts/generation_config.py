"""How a trained model generates: its own generation config, with what ended an answer in the training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.texts.saved_tokenizer import stop_ids

NAME = "generation_config.json"


def generation_config_for(
    model: Any,  # noqa: ANN401 - a transformers model
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no public base class
    *,
    answers: bool,
    settings: Mapping[str, Any] | None = None,
) -> Any:  # noqa: ANN401 - transformers' GenerationConfig
    """Return the generation config of a trained model, for any tool to stop and to pad as in the training.

    Args:
        model: The model, without a wrapper.
        tokenizer: The tokenizer of the training, with its chat template; None leaves the tokens as they are.
        answers: Whether the training taught to answer messages, so that the end of a turn ends an answer.
        settings: Generation settings of the task, such as `num_beams`.

    Returns:
        A copy; None for a model that generates nothing.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or getattr(model, "generation_config", None) is None:
        return None
    config = copy.deepcopy(model.generation_config)
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    if tokenizer is None:
        return config
    ends = list(dict.fromkeys([*own_ends(model), *stop_ids(tokenizer, is_chat=answers)]))
    if ends:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is not None:
        config.pad_token_id = pad
    return config


def own_ends(model: Any) -> list[int]:  # noqa: ANN401 - a transformers model
    """Return the tokens at which a model ends a text by its own configs."""
    configs = (getattr(model, "generation_config", None), getattr(model, "config", None))
    found: Any = next((end for config in configs if (end := getattr(config, "eos_token_id", None)) is not None), [])
    return list(found) if isinstance(found, Sequence) else [found]
