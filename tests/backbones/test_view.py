import pytest
import torch
import transformers
from torch import nn

from lora_lightning import LoRA, attach, merge
from lora_lightning.adapters import PlainView, iter_roles
from lora_lightning.backbones.defaults import USUAL_TARGETS
from lora_lightning.backbones.view import TransformersView, view_of

TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TINY_DECODER = {**TINY, "num_key_value_heads": 1}
TINY_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}

HEADS = [
    (transformers.BertForSequenceClassification, transformers.BertConfig(**TINY), ["classifier"]),
    (transformers.BertForMaskedLM, transformers.BertConfig(**TINY), ["cls"]),
    (transformers.BertModel, transformers.BertConfig(**TINY), []),
    (transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**TINY), ["classifier"]),
    (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
        ["pre_classifier", "classifier"],
    ),
    (transformers.LlamaForCausalLM, transformers.LlamaConfig(**TINY_DECODER), ["lm_head"]),
    (transformers.LlamaForSequenceClassification, transformers.LlamaConfig(**TINY_DECODER), ["score"]),
    (transformers.T5ForConditionalGeneration, transformers.T5Config(**TINY_T5), ["lm_head"]),
]


@pytest.mark.parametrize(("cls", "config", "expected"), HEADS, ids=lambda value: getattr(value, "__name__", ""))
def test_heads_are_found_and_left_out_by_all_linear(cls, config, expected):
    model = cls(config)
    assert view_of(model).head_paths() == expected
    hosts = attach(model, LoRA(r=2, target_modules="all-linear")).hosts
    assert hosts
    assert not any(host.split(".")[0] in expected for host in hosts)


@pytest.mark.parametrize(("cls", "config", "expected"), HEADS, ids=lambda value: getattr(value, "__name__", ""))
def test_usual_targets_exist_on_their_architecture(cls, config, expected):
    model = cls(config)
    suffixes = USUAL_TARGETS[model.config.model_type]
    hosts = attach(model, LoRA(r=2)).hosts
    assert {host.rpartition(".")[2] for host in hosts} == set(suffixes)


def test_an_unknown_architecture_falls_back_to_all_linear():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert isinstance(view_of(model), PlainView)
    assert view_of(model).usual_targets() is None
    assert attach(model, LoRA(r=2)).hosts == ("0", "1")


@pytest.mark.parametrize("host", ["embed_tokens", "lm_head"])
def test_merging_one_half_of_tied_weights_unties_them_in_the_config_too(host, tmp_path):
    config = transformers.LlamaConfig(**TINY_DECODER, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    attach(model, LoRA(r=2, target_modules=[host]))
    with torch.no_grad():
        for _, parameter, _ in iter_roles(model):
            parameter.normal_()
    ids = torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        merge(model)
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        model.save_pretrained(tmp_path)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(again(ids).logits, expected, atol=1e-4)
        again.config.tie_word_embeddings = True
        again.lm_head.weight = again.model.embed_tokens.weight
        assert not torch.allclose(again(ids).logits, expected, atol=1e-2)


def test_merging_elsewhere_leaves_tied_weights_tied():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY_DECODER, tie_word_embeddings=True))
    attach(model, LoRA(r=2, target_modules=["q_proj"]))
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert TransformersView(model).config.tie_word_embeddings
