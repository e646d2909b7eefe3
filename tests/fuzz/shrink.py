"""Small configs of any architecture of transformers: all sizes of a default config made small."""

from __future__ import annotations

from typing import Any

import transformers

IMAGE, PATCH, FRAMES = 32, 8, 2
VOCABULARY = 64

_SIZES: dict[int, tuple[str, ...]] = {
    1: ("num_mel_layers", "num_conv_pos_embedding_groups", "tubelet_temporal", "num_hidden_groups"),
    2: (
        *("num_hidden_layers", "n_layer", "num_layers", "depth", "encoder_layers", "decoder_layers", "num_frames"),
        *("num_encoder_layers", "num_decoder_layers", "num_experts_per_tok", "topk_group", "n_group", "num_blocks"),
        *("num_stages_per_block", "decoder_num_hidden_layers", "num_codebooks", "vision_layers", "n_layers"),
    ),
    4: (
        *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "encoder_attention_heads"),
        *("decoder_attention_heads", "n_heads", "decoder_num_attention_heads", "n_routed_experts", "num_experts"),
        *("num_local_experts", "encoder_num_heads", "decoder_num_heads", "num_conv_pos_embedding_layers"),
    ),
    8: ("head_dim", "d_kv", "sliding_window", "num_mel_bins", "input_feat_per_channel", "window_size", "num_buckets"),
    16: ("projection_dim", "max_source_positions", "context_length", "num_conv_pos_embeddings", "codevector_dim"),
    PATCH: ("patch_size", "feature_projection_input_dim"),
    IMAGE: (
        *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "image_size", "embedding_size", "d_latents"),
        *("decoder_hidden_size", "output_hidden_size", "conv_dim_size", "text_hidden_size", "out_hidden_size"),
    ),
    48: (
        *("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim", "hidden_dim"),
        *("decoder_intermediate_size", "max_position_embeddings", "n_positions", "moe_intermediate_size"),
        *("max_target_positions", "cross_attention_hidden_size", "mlp_ratio_size", "encoder_hidden_dim"),
    ),
    VOCABULARY: ("vocab_size", "max_length_frames", "image_vocab_size"),
}
_DEPTHS = ("depths", "layers", "num_blocks", "depth", "encoder_depths", "decoder_depths")
_HEADS = ("num_heads", "num_attention_heads", "num_head", "n_heads")
_WIDTHS = ("hidden_sizes", "embed_dims", "embed_dim", "encoder_hidden_size", "hidden_dims", "conv_dim", "dims")
_MASKING = ("mask_time_prob", "mask_feature_prob")
"""Masking of long recordings, for which the small ones are too short."""
_STANDARD_DEVIATIONS = ("initializer_range", "init_std", "initializer_std")


def small(default: Any, special: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings that make a config small, those of the configs inside it included.

    Args:
        default: The config, with its defaults.
        special: Settings that go before the general ones.
    """
    settings: dict[str, Any] = {}
    for value, keys in _SIZES.items():
        for key in keys:
            if type(getattr(default, key, None)) is int:
                settings[key] = value
    for key, value in vars(default).items():
        if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
            settings[key] = _listed(key, value)
        elif isinstance(value, transformers.PreTrainedConfig):
            settings[key] = {**small(value), "model_type": value.model_type}
    settings.update({key: 0.1 for key in _STANDARD_DEVIATIONS if isinstance(getattr(default, key, None), float)})
    settings.update({key: 0.0 for key in _MASKING if hasattr(default, key)})
    settings.update(_special_tokens(default))
    return {**settings, **(special or {})}


def _listed(key: str, default: list[int] | tuple[int, ...]) -> list[int] | tuple[int, ...]:
    """Return small values for a setting that has one for each stage of a network."""
    if key in _DEPTHS:
        return [1] * len(default)
    if key in _HEADS:
        return [2] * len(default)
    if key in _WIDTHS:
        return [8 * (index + 1) for index in range(len(default))]
    return default


def _special_tokens(default: Any) -> dict[str, int]:
    """Return ids inside the small vocabulary for the special tokens that lie outside it."""
    keys = [key for key in vars(default) if key.endswith(("_token_id", "_token_index"))]
    outside = [key for key in keys if type(vars(default)[key]) is int and vars(default)[key] >= VOCABULARY]
    return {key: VOCABULARY - 1 - index for index, key in enumerate(outside)}
