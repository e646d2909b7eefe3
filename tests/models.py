"""Tiny random models, one per architecture, built from their configs: hidden size 32, two layers, no dropout."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters

VOCABULARY = 64
NUM_LABELS = 3


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        num_labels=NUM_LABELS,
    )
    return transformers.BertForSequenceClassification(config)


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.1,
        num_labels=NUM_LABELS,
    )
    return transformers.DistilBertForSequenceClassification(config)


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=34,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        num_labels=NUM_LABELS,
    )
    return transformers.RobertaForSequenceClassification(config)


def _modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        pad_token_id=0,
        cls_token_id=1,
        bos_token_id=1,
        sep_token_id=2,
        eos_token_id=2,
        initializer_range=0.1,
        num_labels=NUM_LABELS,
        reference_compile=False,
    )
    return transformers.ModernBertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))


def _qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER))


def _gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        **_DECODER, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    return transformers.Gemma3ForCausalLM(config)


_MIXTURE = {**_DECODER, "num_experts_per_tok": 2}


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_MIXTURE, num_local_experts=4))


def _qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **_MIXTURE, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40, decoder_sparse_step=1
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**_MIXTURE, num_experts=4, moe_intermediate_size=24, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


def _gpt_oss() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(
        **_MIXTURE, num_local_experts=4, head_dim=8, sliding_window=8, rope_parameters=rope
    )
    return transformers.GptOssForCausalLM(config)


def _deepseek_v3() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **_MIXTURE | {"num_key_value_heads": 4},
        n_routed_experts=4,
        moe_intermediate_size=24,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _nemotron_h() -> nn.Module:
    config = transformers.NemotronHConfig(
        **{key: value for key, value in _MIXTURE.items() if key != "num_hidden_layers"},
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        head_dim=8,
    )
    return transformers.NemotronHForCausalLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return transformers.T5ForConditionalGeneration(config)


def _like_bert(name: str, **changes: Any) -> Callable[[], nn.Module]:
    """Return the builder of a relative of BERT, by the prefix of its classes."""

    def builder() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**_bert().config.to_dict(), **changes})
        return getattr(transformers, f"{name}ForSequenceClassification")(config)

    return builder


def _like_llama(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return the builder of a relative of Llama, by the prefix of its classes."""

    def builder() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**_DECODER, **settings)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return builder


def _mt5() -> nn.Module:
    config = {**_t5().config.to_dict(), "feed_forward_proj": "gated-gelu"}
    return transformers.MT5ForConditionalGeneration(transformers.MT5Config(**config))


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        num_labels=NUM_LABELS,
    )
    return transformers.ViTForImageClassification(config)


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "modernbert": _modernbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
    "gemma3": _gemma3,
    "t5": _t5,
}
ARCHITECTURES = tuple(_BUILDERS)
_MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "nemotron_h": _nemotron_h,
}
MIXTURES = tuple(_MIXTURES)
"""Mixtures of experts, which share the layout of their experts' 3-D parameters."""

_RELATIVES: dict[str, Callable[[], nn.Module]] = {
    "camembert": _like_bert("Camembert", max_position_embeddings=34, pad_token_id=1),
    "electra": _like_bert("Electra", embedding_size=16),
    "gemma": _like_llama("Gemma", head_dim=8),
    "gemma2": _like_llama("Gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
    "mistral": _like_llama("Mistral", sliding_window=8),
    "mt5": _mt5,
    "qwen3": _like_llama("Qwen3", head_dim=8),
    "vit": _vit,
    "xlm-roberta": _like_bert("XLMRoberta", max_position_embeddings=34, pad_token_id=1),
}
RELATIVES = tuple(_RELATIVES)
"""Architectures that share most of their code with one of `ARCHITECTURES`, and the vision transformer."""


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a tiny model with random weights, in eval mode; norms and biases are random too."""
    torch.manual_seed(seed)
    model = {**_BUILDERS, **_RELATIVES, **_MIXTURES}[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(model: nn.Module, batch: int = 3, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Return token ids with one padded row, and the decoder's ids where the model has a decoder; or images."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        size = model.config.image_size
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, length - 2 :], mask[-1, length - 2 :] = 0, 0
    batch_inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch_inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, 4), generator=generator)
    return batch_inputs


def logits(model: nn.Module, batch: dict[str, Tensor] | None = None, **changes: Any) -> Tensor:
    """Call the model and return its logits."""
    return model(**(inputs(model) if batch is None else batch), **changes).logits


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 2, std: float = 0.1) -> nn.Module:
    """Move every adapter parameter off its start, so that nothing is zero; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, adapter in iter_adapters(model):
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * std)
    return model


def gap(ours: Tensor, reference: Tensor) -> float:
    """Return the largest difference relative to the reference's largest element."""
    difference = (ours.detach().double() - reference.detach().double()).abs().max()
    return float(difference / reference.detach().double().abs().max().clamp_min(1e-30))
