"""What data must know of a model before it is loaded: its vocabulary, its context, and where it stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lightning.backbones.load import locate


@dataclass(frozen=True)
class ModelFacts:
    """What a model's config says.

    Args:
        vocabulary: Number of tokens that it knows; None where the config does not say.
        context: Number of tokens that it takes; None where the config does not say.
        end_ids: The tokens at which it stops to generate.
    """

    vocabulary: int | None = None
    context: int | None = None
    end_ids: tuple[int, ...] = ()


def model_facts(name: str) -> ModelFacts:
    """Read what the config of a backbone says; nothing where it has none that transformers knows.

    Raises:
        BackboneError: The backbone is not there.
    """
    from transformers import AutoConfig, GenerationConfig

    source = locate(name)
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return ModelFacts()
    try:
        generation = GenerationConfig.from_pretrained(source).eos_token_id
    except (OSError, ValueError):
        generation = None
    text = config.get_text_config()
    ends = [*_ids(getattr(text, "eos_token_id", None)), *_ids(generation)]
    context = getattr(text, "max_position_embeddings", None)
    return ModelFacts(getattr(text, "vocab_size", None), context, tuple(dict.fromkeys(ends)))


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
