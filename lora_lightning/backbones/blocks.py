"""Where the parts of a transformer block are, by transformers' `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning.adapters.view import BlockPlaces

_BERT = BlockPlaces(
    attention_outputs=("attention.output.dense",),
    ffn_outputs=(r"\d+.output.dense",),
    keys_values=("attention.self.key", "attention.self.value"),
    ffn_adds_residual=True,
)
_DECODER = BlockPlaces(
    attention_outputs=("self_attn.o_proj",),
    ffn_outputs=("mlp.down_proj",),
    keys_values=("self_attn.k_proj", "self_attn.v_proj"),
)
_T5 = BlockPlaces(
    attention_outputs=("SelfAttention.o", "EncDecAttention.o"),
    ffn_outputs=("DenseReluDense.wo",),
    keys_values=("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v"),
)

BLOCKS: Mapping[str, BlockPlaces] = {
    "bert": _BERT,
    "camembert": _BERT,
    "distilbert": BlockPlaces(
        attention_outputs=("attention.out_lin",),
        ffn_outputs=("ffn.lin2",),
        keys_values=("attention.k_lin", "attention.v_lin"),
    ),
    "electra": _BERT,
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": _DECODER,
    "gpt2": BlockPlaces(
        attention_outputs=("attn.c_proj",),
        ffn_outputs=("mlp.c_proj",),
        keys_values=("attn.c_attn",),
        fused=("attn.c_attn",),
    ),
    "llama": _DECODER,
    "mistral": _DECODER,
    "modernbert": BlockPlaces(
        attention_outputs=("attn.Wo",),
        ffn_outputs=("mlp.Wo",),
        keys_values=("attn.Wqkv",),
        fused=("attn.Wqkv",),
    ),
    "mt5": _T5,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "roberta": _BERT,
    "t5": _T5,
    "vit": BlockPlaces(
        attention_outputs=("attention.o_proj",),
        ffn_outputs=("mlp.fc2",),
        keys_values=("attention.k_proj", "attention.v_proj"),
    ),
    "xlm-roberta": _BERT,
}
"""The places that bottleneck adapters and IA3 take where the user names none."""
