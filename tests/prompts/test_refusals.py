"""What takes no virtual tokens says so in the library's own error, and stays as it was."""

from __future__ import annotations

import pytest
import torch
import transformers

from lora_lightning.backbones.attach import attach
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import PrefixTuning, PromptTuning, PTuning, PTuningV2
from tests.prompts import oracle, sweep

METHODS = [method(num_virtual_tokens=2) for method in (PromptTuning, PTuning, PrefixTuning, PTuningV2)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {"image_size": 16, "patch_size": 8}
CONVOLUTIONS = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
PER_LAYER = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
ENCODER_DECODER = {
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
}

OTHERS = {
    "image": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **IMAGE)),
    "speech": lambda: transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SMALL, **CONVOLUTIONS)),
    "speech-to-text": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**ENCODER_DECODER, vocab_size=64, pad_token_id=0, max_source_positions=16)
    ),
    "image-and-text": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**SMALL, "vocab_size": 64}, vision_config={**SMALL, **IMAGE})
    ),
    "pools-at-the-end": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL, vocab_size=64)),
    "time-series": lambda: transformers.TimeSeriesTransformerModel(
        transformers.TimeSeriesTransformerConfig(prediction_length=4, context_length=8, d_model=32)
    ),
    "audio-codes": lambda: transformers.MusicgenForCausalLM(
        transformers.MusicgenDecoderConfig(**{key: value for key, value in SMALL.items() if key != "intermediate_size"})
    ),
}


def state_of(model):
    """Return all that attaching may change."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [type(module) for module in model.modules()], hooks, [one.requires_grad for one in model.parameters()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("name", OTHERS)
def test_other_modalities_are_refused(name, method):
    model = OTHERS[name]()
    before = state_of(model)
    with pytest.raises(TargetError, match=rf"do not work on {type(model).__name__} \({model.config.model_type}\)"):
        attach(model, method)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("fsmt", "seq2seq", "the outputs of the model are not those behind the tokens themselves"),
        ("ibert", "masked", "looks up no token embeddings"),
        ("mra", "masked", "they change no hidden state"),
        ("prophetnet", "causal", "do not act as tokens"),
    ],
)
def test_models_in_which_virtual_tokens_are_no_tokens_are_refused(name, kind, reason):
    model = sweep.built(name, kind)
    before = state_of(model)
    with pytest.raises(TargetError, match=reason):
        attach(model, METHODS[0])
    assert state_of(model) == before


def test_embeddings_of_each_layer_by_token_id_are_refused():
    config = transformers.Gemma3nTextConfig(
        **SMALL | {"num_hidden_layers": 2},
        **PER_LAYER,
        vocab_size=64,
        num_key_value_heads=2,
        head_dim=8,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    )
    torch.manual_seed(0)
    model = transformers.Gemma3nForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with pytest.raises(TargetError, match="are not those behind the tokens themselves"):
        attach(model, METHODS[0])


@pytest.mark.parametrize("name", ["gpt_oss", "granite_swa", "nllb-moe"])
def test_attention_that_a_prefix_would_change_is_refused(name):
    model = sweep.built(name, "seq2seq" if name == "nllb-moe" else "causal")
    with pytest.raises(TargetError, match="is another than scaled-dot-product attention"):
        attach(model, METHODS[3])
    attach(model, METHODS[0])


def test_layers_that_start_over_at_position_zero_take_no_prefix():
    model = sweep.built("recurrent_gemma", "causal")
    with pytest.raises(TargetError, match="start over at position 0 only"):
        attach(model, METHODS[3])


def test_arguments_that_virtual_tokens_have_no_value_for_are_refused():
    base = sweep.built("xlnet", "causal")
    model = oracle.adapted(base)
    ids, mask = oracle.rows(base, "whole")
    with pytest.raises(ConfigError, match="'perm_mask' has a value for each token"):
        model(ids, attention_mask=mask, perm_mask=torch.zeros(2, ids.shape[1], ids.shape[1]))
    luke = oracle.adapted(sweep.built("luke", "body"))
    with pytest.raises(ConfigError, match="'entity_position_ids' says where they were"):
        luke(
            ids,
            entity_ids=torch.ones(2, 1, dtype=torch.long),
            entity_position_ids=torch.ones(2, 1, 2, dtype=torch.long),
        )


def test_embeddings_that_a_body_would_not_scale_are_refused():
    base = sweep.built("marian", "seq2seq")
    base.config.scale_embedding = True
    base.model.encoder.embed_scale = 4.0
    model = oracle.adapted(base)
    ids, mask = oracle.rows(base, "whole")
    assert max(oracle.gaps(base, model).values()) <= 1e-5
    with pytest.raises(ConfigError, match="call it with input_ids"):
        model(inputs_embeds=base.get_input_embeddings()(ids), attention_mask=mask, decoder_input_ids=ids)


def test_a_static_cache_is_refused():
    base = sweep.built("llama", "causal")
    model = oracle.adapted(base)
    ids, _ = oracle.rows(base, "whole")
    cache = transformers.StaticCache(config=base.config, max_cache_len=20)
    with pytest.raises(ConfigError, match="static cache"):
        model(ids, past_key_values=cache)
    model(ids, past_key_values=transformers.DynamicCache())


def test_an_embedding_that_was_replaced_is_an_error():
    base = sweep.built("gpt2", "causal")
    model = oracle.adapted(base)
    ids, mask = oracle.rows(base, "whole")
    expected = oracle.call(model, ids, mask)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(oracle.call(model, ids, mask)[..., :64], expected)
    model.set_input_embeddings(torch.nn.Embedding(70, 32))
    with pytest.raises(ConfigError, match="the token embedding was replaced after `attach`"):
        model(ids, attention_mask=mask)
