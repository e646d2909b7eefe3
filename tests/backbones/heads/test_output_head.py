"""What a trial call finds out about the way from hidden states to logits."""

import logging

import pytest
import torch
from torch import nn

from lora_lightning import LoRA, attach
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.backbones.heads.output_head import LogitMap, find_output_head
from tests import models
from tests.tasks import languages

MAPS = {
    "llama": LogitMap(),
    "gpt2": LogitMap(),
    "gemma3": LogitMap(),
    "gemma2": LogitMap(softcap=1.5),
    "granite": LogitMap(scale=1 / 7),
    "cohere": LogitMap(scale=0.0625),
    "phi": LogitMap(),
    "opt": LogitMap(),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_parts_give_the_models_logits(name, dtype):
    model = languages.build(name).to(dtype)
    parts = find_output_head(model)
    assert parts is not None
    assert parts.logit_map == MAPS[name]
    if dtype is not torch.bfloat16:
        batch = models.inputs(model)
        found = parts.logit_map.apply_(parts.head(parts.hidden_states(batch)).detach().clone())
        assert models.gap(found, models.logits(model)) < 1e-6


def test_the_slope_is_the_derivative_of_the_map():
    for logit_map in (LogitMap(), LogitMap(0.3), LogitMap(0.3, 2.0)):
        scores = torch.linspace(-9, 9, 7, dtype=torch.float64)
        below, above = (logit_map.apply_(scores + move) for move in (-1e-6, 1e-6))
        slope = torch.as_tensor(logit_map.slope(logit_map.apply_(scores.clone()))).double()
        assert torch.allclose(slope.expand(7), (above - below) / 2e-6, atol=1e-8)


@pytest.mark.parametrize("change", ["scale", "softcap", "vocabulary"])
def test_a_config_that_does_not_say_it_all_is_noticed(change, caplog):
    model = languages.build("llama")
    altered = {
        "scale": lambda logits: logits * 1.01,
        "softcap": lambda logits: 60 * (logits / 60).tanh(),
        "vocabulary": lambda logits: logits[..., :-4],
    }[change]
    model.register_forward_hook(lambda *call: type(call[-1])(logits=altered(call[-1].logits)))
    with caplog.at_level(logging.WARNING, "lora_lightning"):
        assert find_output_head(model) is None
    assert "something unknown to the logits after its output head" in caplog.text


def test_models_that_cannot_be_taken_apart_say_why(caplog):
    plain = nn.Linear(4, 4)
    whole = languages.build("llama")
    whole.add_module(RESERVED, nn.Identity())
    before = languages.build("llama")
    before.lm_head.register_forward_pre_hook(lambda *call: (call[1][0] * 2,))
    with caplog.at_level(logging.WARNING, "lora_lightning"):
        assert [find_output_head(model) for model in (plain, whole, before)] == [None, None, None]
    reasons = ("which module is its output head", "hangs on the whole model", "before its output head")
    assert all(reason in message for reason, message in zip(reasons, caplog.messages, strict=True))


def test_the_trial_leaves_no_trace():
    model = languages.build("llama").train()
    attach(model, LoRA(r=2, target_modules="all-linear", dropout=0.5))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.random.get_rng_state()
    assert find_output_head(model) is not None
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
