"""Prefixes send all attentions through a function of this library; each part gets back the one that it had."""

from __future__ import annotations

import pytest
import torch

from lora_lightning.adapters import detach
from lora_lightning.backbones import attention
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import TargetError
from lora_lightning.methods import PTuningV2
from tests.fuzz.architectures import Architecture, build
from tests.fuzz.world import attentions

MIXED = [{"vision_config": "sdpa", "text_config": "eager"}, {"vision_config": "eager", "text_config": "sdpa"}]
METHOD = PTuningV2(num_virtual_tokens=2)


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.filterwarnings("ignore")
def test_each_part_gets_its_attention_back(name, mixed, monkeypatch):
    model, _ = build(Architecture(name, "image-text"), torch.float32)
    model.set_attn_implementation(mixed)
    before = attentions(model)
    assert {"sdpa", "eager"} <= set(before)
    attach(model, METHOD)
    assert attention.ROUTED in attentions(model)
    detach(model)
    assert attentions(model) == before
    monkeypatch.setattr(attention, "is_same", lambda *_: False)
    with pytest.raises(TargetError, match="another than scaled-dot-product attention"):
        attach(model, METHOD)
    assert attentions(model) == before


def test_one_name_for_a_model_whose_parts_have_the_same():
    model, _ = build(Architecture("llava", "image-text"), torch.float32)
    model.set_attn_implementation("eager")
    assert attention.implementations(model.config) == "eager"
    model.set_attn_implementation(MIXED[0])
    assert attention.implementations(model.config)["text_config"] == "eager"
    assert attention.implementations(model.config)["vision_config"] == "sdpa"
