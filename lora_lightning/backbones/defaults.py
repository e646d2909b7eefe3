"""What is usual for each architecture, by transformers' `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

_QUERY_VALUE = ("query", "value")
_PROJ = ("q_proj", "v_proj")

USUAL_TARGETS: Mapping[str, tuple[str, ...]] = {
    "albert": _QUERY_VALUE,
    "bart": _PROJ,
    "bert": _QUERY_VALUE,
    "bloom": ("query_key_value",),
    "camembert": _QUERY_VALUE,
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "electra": _QUERY_VALUE,
    "falcon": ("query_key_value",),
    "gemma": _PROJ,
    "gemma2": _PROJ,
    "gemma3": _PROJ,
    "gemma3_text": _PROJ,
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "gpt_oss": _PROJ,
    "llama": _PROJ,
    "mbart": _PROJ,
    "mistral": _PROJ,
    "mixtral": _PROJ,
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
    "mt5": ("q", "v"),
    "olmo2": _PROJ,
    "olmoe": _PROJ,
    "opt": _PROJ,
    "phi": _PROJ,
    "phi3": ("qkv_proj",),
    "qwen2": _PROJ,
    "qwen2_moe": _PROJ,
    "qwen3": _PROJ,
    "qwen3_moe": _PROJ,
    "roberta": _QUERY_VALUE,
    "t5": ("q", "v"),
    "vit": (*_QUERY_VALUE, *_PROJ),  # renamed within transformers 5
    "whisper": _PROJ,
    "xlm-roberta": _QUERY_VALUE,
}
"""Modules that low-rank methods take where the user names none: queries and values, as in the LoRA paper."""

ATTENTION_KEYS: frozenset[str] = frozenset({"k", "k_lin", "k_proj", "key", "key_proj"})
"""Modules that compute attention's keys alone, by the last part of their path."""

DENSE_MODULES: tuple[str, ...] = (
    "classification_head",
    "classifier",
    "cls",
    "embed_out",
    "lm_head",
    "pooler",
    "pre_classifier",
    "proj_out",
    "qa_outputs",
    "score",
    "summary",
)
"""Modules that are never stored quantized, by the last part of their path: heads and poolers, which may be new."""

_ROUTERS = ("gate", "router", "shared_expert_gate")
DENSE_MODULES_BY_TYPE: Mapping[str, tuple[str, ...]] = {
    "deepseek_v3": _ROUTERS,
    "mixtral": _ROUTERS,
    "olmoe": _ROUTERS,
    "phimoe": _ROUTERS,
    "qwen2_moe": _ROUTERS,
    "qwen3_moe": _ROUTERS,
    "switch_transformers": ("classifier", "router"),
}
"""Further ones of single architectures: routers, whose choice of experts small errors flip."""
