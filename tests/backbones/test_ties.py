"""Merging into one of several tied modules: the merged model answers as the adapted one, in memory and reloaded."""

import pytest
import torch
import transformers
from torch import nn

from lora_lightning import LoRA, attach, disabled, merge
from lora_lightning.adapters import iter_roles
from lora_lightning.backbones import ties
from lora_lightning.errors import NotMergeable

IDS = torch.arange(3, 10)[None]
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
T5GEMMA = {**BERT, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 16, "hidden_activation": "gelu"}


def t5gemma():
    parts = [transformers.T5GemmaModuleConfig(**T5GEMMA) for _ in range(2)]
    config = transformers.T5GemmaConfig(encoder=parts[0], decoder=parts[1], vocab_size=64, tie_word_embeddings=True)
    config.encoder.is_decoder = False
    return transformers.T5GemmaForConditionalGeneration(config)


ENCODER_DECODERS = {
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**BART)),
    "pegasus": lambda: transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**BART)),
    "blenderbot": lambda: transformers.BlenderbotForConditionalGeneration(transformers.BlenderbotConfig(**BART)),
    "m2m_100": lambda: transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**BART)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**BART, decoder_start_token_id=1)),
    "plbart": lambda: transformers.PLBartForConditionalGeneration(transformers.PLBartConfig(**BART)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "mt5": lambda: transformers.MT5ForConditionalGeneration(transformers.MT5Config(**T5, tie_word_embeddings=True)),
    "umt5": lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)),
    "longt5": lambda: transformers.LongT5ForConditionalGeneration(transformers.LongT5Config(**T5)),
    "switch": lambda: transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**T5, num_experts=2)
    ),
    "udop": lambda: transformers.UdopForConditionalGeneration(
        transformers.UdopConfig(**T5, image_size=32, patch_size=16)
    ),
    "t5gemma": t5gemma,
}
MASKED = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT)),
    "xlm-roberta": lambda: transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**BERT)),
    "electra": lambda: transformers.ElectraForMaskedLM(transformers.ElectraConfig(**BERT, embedding_size=32)),
    "deberta-v2": lambda: transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**BERT)),
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**BERT, embedding_size=16)),
    "mpnet": lambda: transformers.MPNetForMaskedLM(transformers.MPNetConfig(**BERT)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**BERT, pad_token_id=0)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)
    ),
}


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            # Biases and norms start at 0 and 1, which would hide one that is lost.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of(model):
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :3]
    if model.config.model_type == "udop":
        inputs["bbox"] = torch.zeros(1, 7, 4)
    return inputs


@torch.no_grad()
def logits(model):
    return model(**inputs_of(model)).logits


@torch.no_grad()
def nudge(model):
    torch.manual_seed(1)
    for _, parameter, _ in iter_roles(model):
        parameter.add_(0.3 * torch.randn_like(parameter))


def tied_modules(model):
    """Paths of the modules that share a weight with another one."""
    seen = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Embedding):
            seen.setdefault(id(weight), []).append(path)
    return [path for paths in seen.values() if len(paths) > 1 for path in paths]


def assert_merged_as_adapted(model, folder):
    base = logits(model)
    nudge(model)
    wanted = logits(model)
    size = wanted.abs().max()
    if torch.allclose(base, wanted, atol=1e-3 * size):
        return False  # this module's tokens do not act on the logits
    with disabled(model):
        torch.testing.assert_close(logits(model), base)
    merge(model)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5 * size, rtol=1e-4)
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    torch.testing.assert_close(logits(again), wanted, atol=1e-5 * size, rtol=1e-4)
    return True


@pytest.mark.parametrize("name", [*ENCODER_DECODERS, *MASKED])
@pytest.mark.parametrize("kind", ["adapter", "copy"])
def test_merging_into_each_of_the_tied_modules(name, kind, tmp_path):
    make = {**ENCODER_DECODERS, **MASKED}[name]
    paths = tied_modules(build(make))
    assert len(paths) > 1
    num_seen = 0
    for number, path in enumerate(paths):
        model = build(make)
        others = LoRA(r=2, target_modules=[r".*(q|query|q_proj|q_lin|c_attn|Wqkv|query_proj)$"][0])
        if kind == "adapter":
            attach(model, LoRA(r=2, target_modules=[path]))
        else:
            attach(model, others, modules_to_save=[path])
        num_seen += assert_merged_as_adapted(model, tmp_path / str(number))
    assert num_seen


def test_the_factor_of_tied_weights_is_measured():
    model = build(ENCODER_DECODERS["switch"])
    assert ties.flag_factor(model) == 32**-0.5
    assert model.config.tie_word_embeddings is True
    model.config.tie_word_embeddings = False
    assert ties.flag_factor(model) is None


@pytest.mark.parametrize("name", ["umt5", "udop", "bart", "t5", "t5gemma", "bert"])
def test_models_that_do_not_scale_or_are_always_tied_have_no_factor(name):
    assert ties.flag_factor(build({**ENCODER_DECODERS, **MASKED}[name])) is None


def test_a_flag_that_changes_more_than_a_factor_is_refused():
    class Shifted(transformers.SwitchTransformersForConditionalGeneration):
        def forward(self, *args, **kwargs):
            if self.config.tie_word_embeddings:
                kwargs["decoder_input_ids"] = kwargs["decoder_input_ids"].flip(-1) + 1
            return super().forward(*args, **kwargs)

    model = build(lambda: Shifted(transformers.SwitchTransformersConfig(**T5, num_experts=2)))
    attach(model, LoRA(r=2, target_modules=["lm_head"]))
    nudge(model)
    before = logits(model)
    with pytest.raises(NotMergeable, match="not a factor"):
        merge(model)
    torch.testing.assert_close(logits(model), before)
    assert model.config.tie_word_embeddings is True


def test_what_is_not_merged_into_stays_tied(tmp_path):
    model = build(ENCODER_DECODERS["bart"])
    attach(model, LoRA(r=2, target_modules=["q_proj"]))
    assert assert_merged_as_adapted(model, tmp_path)
    assert model.lm_head.weight is model.model.shared.weight
    assert model.config.tie_word_embeddings is True
