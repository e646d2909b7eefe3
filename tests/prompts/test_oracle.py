"""A prompt that holds tokens' embeddings acts as these tokens: on a few architectures, and on all in the slow run."""

from __future__ import annotations

import pytest
import torch
import transformers

from lora_lightning.backbones.view import view_of
from lora_lightning.methods import PromptTuning, PTuningV2
from tests import models
from tests.prompts import oracle, sweep

PROMPT = PromptTuning(num_virtual_tokens=sweep.NUM)
PREFIX = PTuningV2(num_virtual_tokens=sweep.NUM)
REPRESENTATIVES = [
    *(
        ("bart", "causal"),
        ("bert", "masked"),
        ("bloom", "causal"),
        ("data2vec-text", "masked"),
        ("deberta-v2", "masked"),
    ),
    *(
        ("deepseek_v3", "causal"),
        ("fnet", "masked"),
        ("gemma3_text", "causal"),
        ("gpt2", "causal"),
        ("jamba", "causal"),
    ),
    *(
        ("longformer", "masked"),
        ("m2m_100", "seq2seq"),
        ("mamba", "causal"),
        ("marian", "seq2seq"),
        ("mpnet", "masked"),
    ),
    *(("nystromformer", "masked"), ("opt", "causal"), ("roberta-prelayernorm", "masked"), ("t5", "seq2seq")),
    *(("xlm-roberta-xl", "masked"), ("xlnet", "causal")),
]
"""Every way of counting positions, of caching and of being called that the sweep has met."""

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize(("name", "kind"), REPRESENTATIVES)
def test_prompt_equals_its_tokens(name, kind):
    verdict = sweep.judge(sweep.built(name, kind), name, kind, PROMPT)
    assert verdict.refusal == ""
    assert verdict.faults == []


def encoder_decoder():
    encoder, decoder = (
        transformers.BertConfig(**TEXT, is_decoder=part, add_cross_attention=part) for part in (False, True)
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": rope, "pad_token_id": 0}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("build", [encoder_decoder, qwen2_vl])
def test_models_of_two_parts_take_prompts(build):
    torch.manual_seed(0)
    base = build().eval()
    verdict = sweep.judge(base, base.config.model_type, "causal", PROMPT)
    assert verdict.refusal == ""
    assert verdict.faults == []


def test_the_oracle_sees_wrong_positions_and_wrong_tokens():
    """Controls: a prompt that stands one further on, or holds other tokens, is not the tokens in front."""
    base = sweep.built("roberta", "masked")
    model = oracle.adapted(base)
    assert max(oracle.gaps(base, model).values()) <= sweep.TOLERANCE
    body = model.roberta
    body.embeddings.position_embeddings.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    assert min(oracle.gaps(base, model).values()) > 1e-3
    other = oracle.adapted(base, front=oracle.OTHER_FRONT)
    assert min(oracle.gaps(base, other).values()) > 1e-3


def test_embeddings_in_place_of_ids_act_alike():
    base = sweep.built("gpt2", "causal")
    model = oracle.adapted(base)
    ids, mask = oracle.rows(base, "left")
    embeds = base.get_input_embeddings()(ids)
    expected = oracle.call(model, ids, mask)
    assert models.gap(model(inputs_embeds=embeds, attention_mask=mask).logits, expected) <= 1e-6
    assert models.gap(model(inputs_embeds=embeds.flip(1), attention_mask=mask).logits, expected) > 1e-3


def test_tuples_hold_what_outputs_by_name_hold():
    base = sweep.built("bert", "body")
    model = oracle.adapted(base)
    ids, mask = oracle.rows(base, "right")
    named = model(ids, attention_mask=mask)
    states, pooled = model(ids, attention_mask=mask, return_dict=False)
    assert torch.equal(states, named.last_hidden_state)
    assert torch.equal(pooled, named.pooler_output)
    assert models.gap(pooled, base(ids, attention_mask=mask).pooler_output) > 1e-3


def test_finding_the_place_leaves_modes_and_random_numbers_alone():
    model = sweep.built("reformer", "causal").train()  # which draws random numbers in each call
    model.reformer.encoder.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    view_of(model).prompt_place()
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == modes


def test_prompts_of_two_threads_do_not_mix():
    base = sweep.built("opt", "causal")
    first, second = oracle.adapted(base), oracle.adapted(base, front=oracle.OTHER_FRONT)
    ids, mask = oracle.rows(base, "left")
    expected = [oracle.call(one, ids, mask) for one in (first, second)]
    embedding = first.get_input_embeddings()
    plain = base.get_input_embeddings()(ids)
    seen = []

    def look(*_: object) -> None:
        with torch.no_grad():
            seen.append(oracle.call(second, ids, mask))

    first.model.decoder.layers[0].register_forward_hook(look)
    assert torch.equal(oracle.call(first, ids, mask), expected[0])
    assert torch.equal(seen[0], expected[1])
    assert torch.equal(embedding(ids), plain)


@pytest.fixture(scope="module")
def verdicts():
    return {method: sweep.run(sweep.LANGUAGE, method) for method in (PROMPT, PREFIX)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # each of 250 models has its own
def test_every_language_model_is_right_or_refused(verdicts):
    faults = [verdict for found in verdicts.values() for verdict in found if verdict.faults]
    assert faults == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_documented_list_is_what_was_found(verdicts, capsys):
    found = sweep.lines(*verdicts.values())
    documented = [line for line in sweep.TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    with capsys.disabled():
        accepted = [sum(not one.refusal for one in some) for some in verdicts.values()]
        print(f"\n{len(found)} model types; prompts on {accepted[0]} models, prefixes on {accepted[1]}")
    assert found == documented
    assert accepted[0] > 215


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tokens", "sequence", "body"])
def test_every_other_head_is_right_or_refused(kind):
    found = sweep.run((kind,), PROMPT)
    assert [verdict for verdict in found if verdict.faults] == []
    assert len([verdict for verdict in found if not verdict.refusal]) > 60
