"""Small random models of the architectures of transformers that read text, built from their default configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

VOCABULARY = 64
MAX_POSITIONS = 48
MAX_PARAMETERS = 20_000_000
"""Architectures whose size stays above this with the settings below are left out: their configs are nested."""

KINDS = {
    "causal": ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "tokens": ("AutoModelForTokenClassification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    "sequence": ("AutoModelForSequenceClassification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "body": ("AutoModel", auto.MODEL_MAPPING_NAMES),
}
"""The heads, as transformers' automatic class and the architectures that have them."""

_SIZES: dict[int, tuple[str, ...]] = {
    32: ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "input_embedding_size"),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "num_encoder_layers"),
        *("encoder_layers", "decoder_layers", "num_experts_per_tok", "topk_group", "n_group", "moe_topk"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"),
        *("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
        *("n_routed_experts", "num_experts", "num_local_experts", "mamba_n_heads", "mamba_num_heads"),
    ),
    8: ("head_dim", "d_kv", "sliding_window", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "attention_window"),
    16: ("q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_head_dim", "expert_ffn_hidden_size"),
    24: ("moe_intermediate_size", "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
    48: (
        *("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner"),
        *("d_inner", "ffn_hidden_size", "bigram_vocab_size"),
    ),
    MAX_POSITIONS: ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    VOCABULARY: ("vocab_size", "entity_vocab_size"),
}
_STANDARD_DEVIATIONS = ("initializer_range", "init_std", "initializer_std")

_MIXED = {"layer_types": ["linear_attention", "full_attention"]}

_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _MIXED,
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"mask_token_id": 2},
    "falcon": {"head_dim": None},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "n_head": 4, "d_head": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MIXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["linear_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron_h": {"num_hidden_layers": None, "layers_block_type": ["full_attention", "moe"]},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen3_5_moe_text": _MIXED,
    "qwen3_5_text": _MIXED,
    "qwen3_next": _MIXED,
    "qwen4_exp_text": _MIXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [6, 8],
        "attention_head_size": 8,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "is_decoder": True,
    },
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "hybrid", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}


def names() -> list[str]:
    """Return the model types that some head for text is written for."""
    return sorted({name for _, known in KINDS.values() for name in known})


def config_of(name: str) -> Any:
    """Return a small config of a model type, every special token inside the vocabulary."""
    cls = transformers.CONFIG_MAPPING[name]
    default = cls()
    settings: dict[str, Any] = {}
    for value, keys in _SIZES.items():
        settings.update({key: value for key in keys if _is_size(default, key)})
    settings.update({key: 0.1 for key in _STANDARD_DEVIATIONS if isinstance(getattr(default, key, None), float)})
    special = [key for key in dir(default) if key.endswith(("_token_id", "_token_index"))]
    outside = [key for key in special if isinstance(getattr(default, key), int) and getattr(default, key) >= VOCABULARY]
    settings.update({key: VOCABULARY - 1 - index for index, key in enumerate(outside)})
    if getattr(default, "pad_token_id", None) is None:
        settings["pad_token_id"] = 0
    settings.update(_SPECIAL.get(name, {}))
    return cls(**{key: value for key, value in settings.items() if value is not None})


def _is_size(config: Any, key: str) -> bool:
    return hasattr(config, key) and isinstance(getattr(config, key), int | None)


def build(name: str, kind: str, seed: int = 0) -> nn.Module:
    """Build a model in eval mode with random weights; nothing stays at zero, norms and biases included.

    Raises:
        TooLargeError: It has too many parameters even so.
    """
    auto_class = getattr(transformers, KINDS[kind][0])
    config = config_of(name)
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise TooLargeError(f"{name} has {size:,} parameters")
    torch.manual_seed(seed)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


class TooLargeError(ValueError):
    """A config cannot be made small by the settings that most configs share."""
