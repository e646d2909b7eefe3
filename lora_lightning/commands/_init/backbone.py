"""The backbone of a config, and its properties as far as they are known locally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.backbones.load import load_tokenizer, locate
from lora_lightning.commands._init.choice import Choice
from lora_lightning.commands._init.columns import Column
from lora_lightning.data.model_facts import model_facts
from lora_lightning.errors import BackboneError, ConfigError

_ENCODER, _DECODER, _BOTH = "encoder", "decoder", "encoder-decoder"
_USUAL = {
    "Seq2SeqLM": ("google/flan-t5-base", "google/mt5-base"),
    "CausalLM": ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
}
_USUAL_ENCODERS = ("FacebookAI/roberta-base", "FacebookAI/xlm-roberta-base")
"""The usual backbone of a task for English, and for texts that are mostly in other scripts."""
_ARCHITECTURES = {"Seq2SeqLM": _BOTH, "CausalLM": _DECODER}
_LATIN = 0x24F
_LETTERS_LOOKED_AT = 100_000


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A backbone, and its properties if its files are on this machine.

    Args:
        name: Hub name, folder, or `pkg://package/folder`.
        is_here: Whether its config and its tokenizer can be read without a download.
        architecture: `encoder`, `decoder` or `encoder-decoder`; None if unknown.
        context: Maximum number of tokens; None if unknown.
        has_template: Whether its tokenizer has a chat template.
    """

    name: str
    is_here: bool = False
    architecture: str | None = None
    context: int | None = None
    has_template: bool = True


def look_at(name: str) -> Backbone:
    """Return the properties of a backbone that are known without a download.

    Raises:
        BackboneError: A folder is meant, and is not there or holds no model.
    """
    if not _is_here(name):
        return Backbone(name=name)
    tokenizer = load_tokenizer(name)
    limits = [one for one in (model_facts(name).context, tokenizer.model_max_length) if one is not None]
    return Backbone(
        name=name,
        is_here=True,
        architecture=_architecture_of(name),
        context=min(limits),
        has_template=bool(tokenizer.chat_template),
    )


def usual_backbone(choice: Choice, columns: Sequence[Column]) -> str:
    """Return the backbone that is usually taken for a task."""
    english, other = _USUAL.get(choice.task, _USUAL_ENCODERS)
    return other if _is_of_other_script(columns) else english


def check_fits(backbone: Backbone, task: str) -> None:
    """Refuse a backbone that cannot do a task.

    Raises:
        ConfigError: It cannot.
    """
    needed = _ARCHITECTURES.get(task)
    if needed is None or backbone.architecture in (None, needed):
        return
    raise ConfigError(
        f"{task} needs a model of the kind {needed!r}, and {backbone.name} is of the kind {backbone.architecture!r}. "
        "Name another --backbone, or another --task."
    )


def template_for(backbone: Backbone, choice: Choice) -> dict[str, str]:
    """Return the chat template for conversations if the tokenizer has none."""
    return {"template": "dialogue"} if choice.has_turns and not backbone.has_template else {}


def _is_here(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    looks_local = name.startswith(("pkg://", ".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    if looks_local:
        return bool(locate(name))
    try:
        is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise BackboneError(
            f"--backbone is {name!r}: expected a Hub name, a folder, or pkg://package/folder."
        ) from error
    return is_cached and isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str)


def _architecture_of(name: str) -> str | None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    try:
        config: Any = AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    if getattr(config, "is_encoder_decoder", False):
        return _BOTH
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return _ENCODER
    return _DECODER if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def _is_of_other_script(columns: Sequence[Column]) -> bool:
    """Return whether a good part of the letters are not Latin."""
    texts = "".join(str(cell) for column in columns if column.is_text for cell in column.filled[:1000])
    letters = [letter for letter in texts[:_LETTERS_LOOKED_AT] if letter.isalpha()]
    return sum(ord(letter) > _LATIN for letter in letters) > len(letters) / 4
