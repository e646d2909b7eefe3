"""What a trial run on two tokens shows of a transformers model, and that it leaves no trace."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from lora_lightning import BitFit, DoRA, LoRA, attach
from lora_lightning.backbones.trials import read_past as trial
from lora_lightning.backbones.trials.read_past import read_past
from lora_lightning.errors import TargetError
from tests import models

_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
_ATTENTION = {**_SMALL, "num_attention_heads": 4, "intermediate_size": 48}


def _mamba():
    return transformers.MambaForCausalLM(transformers.MambaConfig(**_SMALL, state_size=4))


def _falcon_mamba():
    return transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**_SMALL, state_size=4))


def _mamba2():
    config = transformers.Mamba2Config(**_SMALL, state_size=4, num_heads=8, head_dim=8, n_groups=1)
    return transformers.Mamba2ForCausalLM(config)


def _recurrent_gemma():
    settings = {**_ATTENTION, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32}
    config = transformers.RecurrentGemmaConfig(**settings, attention_window_size=8)
    return transformers.RecurrentGemmaForCausalLM(config)


def _deberta():
    settings = {**_ATTENTION, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "legacy": False}
    return transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**settings))


# The model, a module whose weight it reads, and one that it calls.
CASES = {
    "mamba": (_mamba, "dt_proj", "x_proj"),
    "falcon_mamba": (_falcon_mamba, "dt_proj", "in_proj"),
    "mamba2": (_mamba2, "conv1d", "in_proj"),
    "recurrent_gemma": (_recurrent_gemma, "conv_1d", "linear_y"),
    "relative positions": (_deberta, "rel_embeddings", "query_proj"),
    "a head that takes the embeddings": (_deberta, "word_embeddings", "key_proj"),
}


def build(name):
    torch.manual_seed(0)
    return CASES[name][0]().eval()


@pytest.mark.parametrize("name", CASES)
def test_weights_that_are_read_past_are_refused_by_name(name):
    _, wrong, right = CASES[name]
    for method in (LoRA, DoRA):
        with pytest.raises(TargetError, match=rf"reads 'weight' of '.*{wrong}' without calling"):
            attach(build(name), method(r=1, target_modules=[wrong]))
    with pytest.raises(TargetError, match=f"{wrong}' without calling"):
        attach(build(name), LoRA(r=1, target_modules=[right]), modules_to_save=[wrong])
    model = build(name)
    report = attach(model, LoRA(r=1, target_modules=[right]))
    model(torch.ones(1, 5, dtype=torch.long)).logits.sum().backward()
    assert all(right in host for host in report.hosts)
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_all_linear_leaves_them_out_with_one_line(name):
    model = build(name)
    with pytest.warns(UserWarning, match="leaves out 2 layers whose weight this model reads") as told:
        report = attach(model, LoRA(r=1, target_modules="all-linear"))
    assert len(told) == 1
    assert not any("dt_proj" in host for host in report.hosts)
    model(torch.ones(1, 5, dtype=torch.long)).logits.sum().backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)


def test_biases_that_are_read_past_get_no_delta():
    with pytest.raises(TargetError, match=r"does not know how to shift, such as '.*dt_proj'"):
        attach(build("mamba"), BitFit(bias=["dt_proj"]))


@pytest.mark.parametrize("name", [*models.ARCHITECTURES, *models.MIXTURES, *models.RELATIVES])
def test_usual_models_read_nothing_past(name):
    assert read_past(models.build(name)) == {}


@pytest.mark.parametrize("name", ["mamba", "mamba2", "recurrent_gemma"])
def test_a_model_without_weights_shows_the_same(name, monkeypatch):
    found = read_past(build(name))
    assert found
    with torch.device("meta"):
        assert read_past(CASES[name][0]()) == found
    monkeypatch.setattr(trial, "_TOO_LARGE", 10)  # then a twin without weights runs in its place
    model = build(name)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert read_past(model) == found
    assert not calls


@pytest.mark.parametrize("name", ["recurrent_gemma", "mamba"])
@pytest.mark.parametrize("training", [False, True])
def test_a_trial_leaves_no_trace(name, training):
    model = build(name).train(training)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    state, random = torch.random.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    threads, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_past(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, random[name]) for name, value in model.state_dict().items())
    assert (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()) == (threads, fast)
    for path, module in model.named_modules():
        assert module.__dict__.keys() == before[path].keys()
        assert all(module.__dict__[key] is value for key, value in before[path].items())


def test_a_trial_runs_once_for_the_same_modules():
    model, calls = build("mamba"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = read_past(model)
    once = len(calls)
    assert read_past(model) == found
    assert len(calls) == once > 0
    mixer = model.get_submodule("backbone.layers.1.mixer")
    mixer.dt_proj = nn.Linear(mixer.dt_proj.in_features, mixer.dt_proj.out_features)
    assert read_past(model) == found
    assert len(calls) == 2 * once


def test_what_cannot_run_shows_nothing():
    class Broken(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise RuntimeError("of its own")

    torch.manual_seed(0)
    broken = Broken(models.build("llama").config)
    assert read_past(broken) == {}
    assert attach(broken, LoRA(r=1)).hosts
    assert read_past(models.build("vit")) == {}


def test_containers_are_refused_as_copies():
    model = models.build("bert")
    with pytest.raises(TargetError, match=r"'bert\.encoder\.layer' is a ModuleList.*bert\.encoder\.layer\.0"):
        attach(model, LoRA(r=1), modules_to_save=["encoder.layer"])
    attach(model, LoRA(r=1, target_modules=["layer.0.attention.self.query"]), modules_to_save=["layer.1"])

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.out = nn.ModuleDict({"a": nn.Linear(4, 4)}), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.parts["a"](x))

    with pytest.raises(TargetError, match="'parts' is a ModuleDict"):
        attach(Holder(), LoRA(r=1, target_modules=["out"]), modules_to_save=["parts"])
    assert attach(Holder(), LoRA(r=1, target_modules=["out"]), modules_to_save=["parts.a"]).hosts == ("parts.a", "out")
