"""The `adapter_config.json` of PEFT's LoRA, checked against our schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.schema.fields import (
    NAMES,
    TARGETS,
    Field,
    is_count,
    is_flag,
    is_map_of,
    is_names,
    is_number,
    is_share,
    is_wholes,
    read_fields,
    refuse_unknown,
)
from lora_lightning.peft_format.schema.targets import TargetConfig, ends_like, in_lists

# How an adapter was initialised matters only where PEFT also changed the base weights while doing so.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "true", "false")
_COMPUTED = "plain LoRA, rsLoRA and DoRA"


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TargetConfig):
    """The part of PEFT's `LoraConfig` that this library computes; for each field see there.

    Args:
        r: Usual rank.
        alpha: Usual `lora_alpha`.
        dropout: `lora_dropout`.
        use_rslora: Whether the scaling is alpha / sqrt(r).
        use_dora: Whether the adapter is DoRA.
        target_parameters: Path suffixes of parameters of two or three dimensions.
        rank_pattern: Other ranks, by regular expression for the end of a path.
        alpha_pattern: Other alphas, likewise.
        bias: `none`, or whose biases of the base were trained: `all` or `lora_only`.
        lora_bias: Whether each B has a bias.
        token_indices: Rows trained of the input embeddings, or by the endings of embeddings' paths; None for none.
        ties: Whether modules that share a weight with a target or a copy were adapted or copied too.
    """

    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    target_parameters: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    bias: str
    lora_bias: bool
    token_indices: list[int] | dict[str, list[int]] | None
    ties: bool

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Return rank and alpha of one host, as PEFT's patterns give them."""
        rank = next((value for key, value in self.rank_pattern.items() if ends_like(path, key)), self.r)
        alpha = next((value for key, value in self.alpha_pattern.items() if ends_like(path, key)), self.alpha)
        return rank, alpha


def parse_lora(data: Mapping[str, Any], source: str) -> LoraConfig:
    """Check the content of an `adapter_config.json` of LoRA.

    Raises:
        CheckpointError: A value is missing, of the wrong kind, or an option that this library does not compute.
    """
    refuse_changed_base(data, source)
    refuse_unknown(data, {*LORA_FIELDS, "init_lora_weights", "loftq_config"}, _COMPUTED, source)
    config = LoraConfig(**in_lists(read_fields(data, LORA_FIELDS, source)))
    config.check_patterns(source, [*config.rank_pattern, *config.alpha_pattern])
    return config


def refuse_changed_base(data: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter whose initial update was subtracted from the base's weights.

    Raises:
        CheckpointError: It was.
    """
    init = data.get("init_lora_weights", True)
    if init is not None and init not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{source}: init_lora_weights={init!r} changed the base weights too, so the adapter alone does not give "
            "the model back. Convert it with PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...))."
        )


def is_tokens(value: object) -> bool:
    """Return whether a value is a list of token ids, or lists of them by name."""
    return is_wholes(value) if isinstance(value, list) else is_map_of(lambda ids: isinstance(ids, list))(value)


# PEFT's name -> our name, expected type, and the meaning of null or a missing value.
LORA_FIELDS = {
    **TARGETS,
    "r": Field("r", "a whole number from 1", is_count),
    "lora_alpha": Field("alpha", "a number above 0", is_number),
    "lora_dropout": Field("dropout", "a number from 0 and below 1", is_share, 0.0),
    "use_rslora": Field("use_rslora", "true or false", is_flag, False),
    "use_dora": Field("use_dora", "true or false", is_flag, False),
    "target_parameters": Field("target_parameters", NAMES, is_names, []),
    "rank_pattern": Field("rank_pattern", "an object of whole numbers from 1", is_map_of(is_count), {}),
    "alpha_pattern": Field("alpha_pattern", "an object of numbers above 0", is_map_of(is_number), {}),
    "bias": Field("bias", "none, all or lora_only", lambda value: value in ("none", "all", "lora_only"), "none"),
    "lora_bias": Field("lora_bias", "true or false", is_flag, False),
    "trainable_token_indices": Field("token_indices", "token ids, or lists of them by module", is_tokens, None),
    "ensure_weight_tying": Field("ties", "true or false", is_flag, False),
}
