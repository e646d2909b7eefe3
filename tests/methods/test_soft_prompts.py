"""Soft prompts and prefixes: against PEFT, against a cache, padding, generation, folding, and what is refused."""

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_lightning.adapters import (
    adapter_state_dict,
    detach,
    fold,
    folded_state_dict,
    iter_adapters,
    load_adapter_state_dict,
)
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.backbones.heads.output_head import without_cache
from lora_lightning.errors import CheckpointError, ConfigError, NotMergeable, TargetError
from lora_lightning.methods import PrefixTuning, PromptTuning, PTuning, PTuningV2
from lora_lightning.methods.prefix import PrefixAdapter
from tests import models

NUM = 4
METHODS = [method(num_virtual_tokens=NUM) for method in (PromptTuning, PTuning, PrefixTuning, PTuningV2)]
DECODERS = ("gpt2", "llama", "qwen2", "gemma3")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
COUNTS_PADDING = ("gpt2", "bert", "distilbert", "electra")
"""Architectures whose positions count padding on the left too, unless they are given."""


def by_name(method):
    return method.name


@pytest.fixture(params=METHODS, ids=by_name)
def method(request):
    return request.param


def adapted(architecture, method):
    model = models.build(architecture)
    torch.manual_seed(3)
    attach(model, method)
    return models.perturb(model)


def body(model):
    return getattr(model, model.base_model_prefix)


def adapter_of(model):
    return next(adapter for _, _, adapter in iter_adapters(model))


def copy_encoder(model, reference):
    """Copy PEFT's prompt encoder into ours; return the tensor to disturb for a control."""
    [theirs] = reference.prompt_encoder.values()
    prefixes = [adapter for _, _, adapter in iter_adapters(model) if isinstance(adapter, PrefixAdapter)]
    with torch.no_grad():
        if not prefixes:
            ours = adapter_of(model)
            if ours.encoder is None:
                ours.prompt.copy_(theirs.embedding.weight)
                return ours.prompt
            ours.encoder.embedding.copy_(theirs.embedding.weight)
            ours.encoder.mlp.load_state_dict(theirs.mlp_head.state_dict())
            return ours.encoder.embedding
        if prefixes[0].encoder is None:
            stacked = theirs.embedding.weight.view(NUM, len(prefixes), 2, *prefixes[0].prefix_keys.shape[::2])
            for index, one in enumerate(prefixes):
                one.prefix_keys.copy_(stacked[:, index, 0].transpose(0, 1))
                one.prefix_values.copy_(stacked[:, index, 1].transpose(0, 1))
            return prefixes[0].prefix_values
        shared = prefixes[0].encoder.shared
        shared.embedding.copy_(theirs.embedding.weight)
        shared.project.load_state_dict(theirs.transform[0].state_dict())
        rows = theirs.transform[2].weight.chunk(len(prefixes)), theirs.transform[2].bias.chunk(len(prefixes))
        for one, weight, bias in zip(prefixes, *rows, strict=True):
            one.encoder.project.weight.copy_(weight)
            one.encoder.project.bias.copy_(bias)
        return shared.embedding


PEFT_CONFIGS = {
    "prompt_tuning": (peft.PromptTuningConfig, {}),
    "p_tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 32}),
    "prefix_tuning": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 32}),
    "p_tuning_v2": (peft.PrefixTuningConfig, {"prefix_projection": False}),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT reads the old name
@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        pytest.param(architecture, method, id=f"{architecture}-{method.name}")
        for architecture in ("gpt2", "llama", "qwen2", "bert")
        for method in METHODS
        # PEFT's projection is as wide as the keys, ours as the embeddings: with grouped queries these differ.
        if not (isinstance(method, PrefixTuning) and architecture in ("llama", "qwen2"))
    ],
)
def test_equals_peft(architecture, method):
    """Logits of decoders, hidden states of an encoder, whose classifier PEFT lets read a virtual token."""
    cls, settings = PEFT_CONFIGS[method.name]
    kind = "FEATURE_EXTRACTION" if architecture == "bert" else "CAUSAL_LM"
    ours, theirs = models.build(architecture), models.build(architecture)
    if architecture == "bert":
        ours, theirs = ours.bert, theirs.bert
    torch.manual_seed(3)
    attach(ours, method)
    reference = peft.get_peft_model(theirs, cls(task_type=kind, num_virtual_tokens=NUM, **settings)).eval()
    disturbed = copy_encoder(ours, reference)
    batch = models.inputs(ours)
    mask = batch["attention_mask"].bool()
    key = "last_hidden_state" if architecture == "bert" else "logits"
    expected = reference(**batch)[key][:, -mask.shape[1] :]
    actual = ours(**batch)[key]
    assert models.gap(actual[mask], expected[mask]) <= 1e-5
    with torch.no_grad():
        disturbed.mul_(1.5)
    assert models.gap(ours(**batch)[key][mask], expected[mask]) > 1e-4


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_prefix_equals_a_cache_that_holds_it(architecture):
    model = adapted(architecture, PTuningV2(num_virtual_tokens=NUM))
    prefixes = [adapter for _, _, adapter in iter_adapters(model) if isinstance(adapter, PrefixAdapter)]
    batch = models.inputs(model, length=4)  # with the prefix as long as Gemma's window, from which a cache slides out
    actual = models.logits(model, batch)
    detach(model)
    results = []
    for factor in (1.0, 1.5):
        cache = transformers.DynamicCache()
        for index, one in enumerate(prefixes):
            keys, values = (part.detach().expand(3, -1, -1, -1) for part in (one.prefix_keys, one.prefix_values))
            cache.update(keys, values * factor, index)
        mask = torch.cat([torch.ones(3, NUM, dtype=torch.long), batch["attention_mask"]], 1)
        positions = (mask.cumsum(1) - 1)[:, NUM:]
        given = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions}
        results.append(model(**given, past_key_values=cache).logits)
    real = batch["attention_mask"].bool()
    assert models.gap(actual[real], results[0][real]) <= 1e-5
    assert models.gap(actual[real], results[1][real]) > 1e-4


def padded(model, side):
    """Return the same rows padded on one side, and where their real tokens are."""
    batch = models.inputs(model)
    real = batch["attention_mask"].bool()
    batch["input_ids"][~real] = model.config.pad_token_id
    if side == "left":
        for name in ("input_ids", "attention_mask"):
            batch[name][-1] = batch[name][-1].roll(2)
    real = batch["attention_mask"].bool()
    if model.config.model_type in COUNTS_PADDING:
        batch["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
    return batch, real


@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS, "t5"])
def test_padding_on_either_side_changes_nothing(architecture, method):
    model = adapted(architecture, method)
    called = body(model) if architecture in ENCODERS else model
    results = []
    for side in ("right", "left"):
        batch, real = padded(model, side)
        output = called(**batch)[0] if architecture in ENCODERS else called(**batch).logits
        results.append(output if architecture == "t5" else output[real])
    assert models.gap(*results) <= 1e-5
    batch["input_ids"][-1, -1] += 1  # a real token counts
    changed = called(**batch)[0] if architecture in ENCODERS else called(**batch).logits
    assert models.gap(changed if architecture == "t5" else changed[real], results[1]) > 1e-4


@pytest.mark.parametrize("architecture", [*DECODERS, "t5"])
def test_cached_generation_equals_uncached(architecture, method):
    model = adapted(architecture, method)
    batch, _ = padded(model, "left")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    rows = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    cached = model.generate(**rows, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(**rows, use_cache=False, **settings))
    alone = model.generate(rows["input_ids"][-1:, 2:], use_cache=True, **settings)
    assert torch.equal(alone[0, -6:], cached[-1, -6:])


def test_classifier_reads_the_first_real_token(method):
    model = adapted("bert", method)
    batch, _ = padded(model, "right")
    states = model.bert(**batch).last_hidden_state
    pooled = torch.tanh(model.bert.pooler.dense(states[:, 0]))
    assert models.gap(models.logits(model, batch), model.classifier(pooled)) <= 1e-6
    if isinstance(method, PrefixTuning | PTuningV2):
        return  # the pooler is the base's own, which reads the first position
    left, _ = padded(model, "left")
    assert models.gap(models.logits(model, left), models.logits(model, batch)) <= 1e-5


def test_given_positions_are_moved_on(method):
    model = adapted("llama", method)
    batch = models.inputs(model)
    expected = models.logits(model, batch)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    real = batch["attention_mask"].bool()
    assert models.gap(models.logits(model, batch, position_ids=positions)[real], expected[real]) <= 1e-5
    stretched = models.logits(model, batch, position_ids=positions * 2)
    assert models.gap(stretched[real], expected[real]) > 1e-4


def test_prefix_positions_count_from_its_length():
    model = adapted("gpt2", PTuningV2(num_virtual_tokens=NUM))
    seen = []
    model.transformer.wpe.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert seen[0].tolist() == [[NUM, NUM + 1, NUM + 2]]


def test_prefix_stays_visible_in_windows():
    """Gemma's first layer sees 8 tokens back; the last of 20 tokens still sees the prefix."""
    model = adapted("gemma3", PTuningV2(num_virtual_tokens=NUM))
    prefix = next(one for _, _, one in iter_adapters(model) if isinstance(one, PrefixAdapter))
    ids = torch.randint(3, models.VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids).logits[0, -1].sum().backward()
    assert prefix.prefix_values.grad.abs().max() > 1e-6


@pytest.mark.parametrize(
    "method",
    [PTuning(num_virtual_tokens=NUM), PTuning(num_virtual_tokens=NUM, encoder="lstm"), METHODS[2]],
    ids=["mlp", "lstm", "prefix"],
)
def test_folding_keeps_the_answer_and_drops_the_encoder(method):
    model = adapted("bert", method)
    expected, state = models.logits(model), folded_state_dict(model)
    assert not any("encoder" in name.rpartition("bert.")[2].split(".layer")[0] for name in state if "prompt" in name)
    assert sum(one.numel() for one in state.values()) < sum(one.numel() for one in adapter_state_dict(model).values())
    state = {name: tensor.clone() for name, tensor in state.items()}
    fold(model)
    assert adapter_state_dict(model).keys() == state.keys()
    assert models.gap(models.logits(model), expected) <= 1e-6
    torch.manual_seed(99)
    other = models.build("bert")
    attach(other, method)
    assert models.gap(models.logits(other), expected) > 1e-3
    load_adapter_state_dict(other, state)
    assert models.gap(models.logits(other), expected) <= 1e-6
    with pytest.raises(CheckpointError):
        load_adapter_state_dict(other, dict(list(state.items())[1:]))


def test_encoders_are_those_of_plain_torch():
    for kind in ("mlp", "lstm"):
        model = adapted("bert", PTuning(num_virtual_tokens=NUM, encoder=kind, encoder_hidden_size=6))
        encoder = adapter_of(model).encoder
        states = encoder.embedding
        if kind == "lstm":
            lstm = nn.LSTM(32, 6, 2, bidirectional=True)
            lstm.load_state_dict(encoder.lstm.state_dict())
            states = lstm(states)[0]
        for layer in encoder.mlp:
            states = states @ layer.weight.T + layer.bias if isinstance(layer, nn.Linear) else states.clamp_min(0)
        assert models.gap(adapter_of(model).virtual_tokens(), states) <= 1e-6
        assert models.gap(adapter_of(model).virtual_tokens(), states.flip(0)) > 1e-3


def test_vocabulary_and_text_start_from_the_models_own_embeddings(monkeypatch):
    for settings in ({}, {"init": "text", "init_text": "good or bad"}):
        model = models.build("gemma3")  # which scales its embeddings
        monkeypatch.setattr("lora_lightning.backbones.view.TransformersView.tokenize", lambda *_: [5, 9, 11])
        attach(model, PromptTuning(num_virtual_tokens=NUM, **settings))
        prompt, embeddings = adapter_of(model).prompt, model.model.embed_tokens(torch.arange(models.VOCABULARY))
        nearest = (prompt[:, None] - embeddings).abs().amax(2).min(1)
        assert nearest.values.max() <= 1e-5
        if settings:
            assert nearest.indices.tolist() == [5, 9, 11, 5]


def test_mistakes_are_told_in_a_sentence(method):
    with pytest.raises(ConfigError, match="num_virtual_tokens must be an integer of at least 1"):
        type(method)(num_virtual_tokens=0)
    model = adapted("bert", method)
    with pytest.raises(NotMergeable, match="cannot be merged"):
        merge(model)
    with pytest.raises(ConfigError, match="30 tokens and 4 virtual ones are more than the model's 32 positions"):
        model(input_ids=torch.ones(1, 30, dtype=torch.long))
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ConfigError, match="packed"):
        model(input_ids=torch.ones(1, 5, dtype=torch.long), position_ids=packed)
    with pytest.raises(ConfigError, match="4 dimensions"):
        model(input_ids=torch.ones(1, 5, dtype=torch.long), attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(TargetError, match="not a transformers model"):
        attach(nn.Sequential(nn.Linear(2, 2)), method)


def test_text_and_its_init_belong_together():
    for settings in ({"init": "text"}, {"init_text": "hello"}):
        with pytest.raises(ConfigError, match="init_text"):
            PromptTuning(**settings)
    with pytest.raises(ConfigError, match="prefix_projection"):
        PrefixTuning(prefix_projection=False, encoder_hidden_size=8)


@pytest.mark.parametrize("name", ["DebertaV2", "MPNet", "Bloom"])
@pytest.mark.parametrize("method", METHODS[2:], ids=by_name)
def test_architectures_without_the_interface_take_no_prefix(name, method):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        n_layer=1,
        n_head=2,
    )
    model = getattr(transformers, f"{name}Model")(config)
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(TargetError, match=config.model_type):
        attach(model, method)
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_detach_gives_the_attention_back(method):
    model = models.build("llama")
    implementation, expected = model.config._attn_implementation, models.logits(model)
    attach(model, method)
    detach(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(models.logits(model), expected)


@pytest.mark.parametrize("method", METHODS[2:], ids=by_name)
def test_an_attention_that_caps_its_scores_takes_no_prefix(method):
    model = models.build("gemma2")
    with pytest.raises(TargetError, match=r"do not work on gemma2: it caps the scores .* Use PromptTuning"):
        attach(model, method)
    attach(model, METHODS[0])
    assert models.logits(models.perturb(model)).isfinite().all()


@pytest.mark.parametrize("name", ["electra", "qwen3", "mistral", "gemma", "xlm-roberta"])
def test_relatives_do_not_mind_padding(name, method):
    model = body(models.build(name))
    torch.manual_seed(3)
    attach(model, method)
    models.perturb(model)
    states = []
    for side in ("right", "left"):
        batch, real = padded(model, side)
        states.append(model(**batch).last_hidden_state[real])
    assert models.gap(*states) <= 1e-5
    detach(model)
    assert models.gap(model(**batch).last_hidden_state[real], states[0]) > 1e-3


@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS, "t5"])
def test_hidden_states_are_there_at_the_inputs_length(architecture, method):
    model = models.build(architecture)
    name = "encoder_hidden_states" if architecture == "t5" else "hidden_states"
    expected = hidden_states_of(model, name)
    attach(model, method)
    states = hidden_states_of(model, name)
    assert len(states) == len(expected) > 2
    virtual = NUM if architecture == "t5" and isinstance(method, PromptTuning | PTuning) else 0  # its decoder sees them
    assert all(one.shape[1] == other.shape[1] + virtual for one, other in zip(states, expected, strict=True))


def hidden_states_of(model, name):
    return getattr(model(**models.inputs(model), output_hidden_states=True), name)


def test_an_adapted_body_still_takes_what_the_base_takes(method):
    model = models.build("llama")
    assert without_cache(model.model) == {"use_cache": False}
    attach(model, method)
    assert without_cache(model.model) == {"use_cache": False}
    assert without_cache(model.lm_head) == {}
