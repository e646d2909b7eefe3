"""The fingerprint tells base models apart, and depends on nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lora_lightning.adapters import Method, attach, disabled
from lora_lightning.backbones.attach import attach as attach_to_backbone
from lora_lightning.checkpoint.fingerprint import check_fingerprint, fingerprint
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import BottleneckAdapter, DoRA, LoRA, PrefixTuning, PromptTuning, PTuning, PTuningV2
from tests.models import build, perturb

TARGETS = ["query", "word_embeddings"]


def test_depends_on_the_base_alone(build_model: Callable[..., nn.Module]) -> None:
    model, other = build_model("bert"), build_model("bert")
    attach(model, LoRA(r=2, target_modules=TARGETS), modules_to_save=["classifier"])
    attach(other, DoRA(r=4, target_modules=TARGETS))
    expected = fingerprint(model)
    perturb(model)
    assert fingerprint(model) == expected == fingerprint(other)
    with disabled(model):
        assert fingerprint(model) == expected


def test_depends_on_every_host_and_on_no_head(build_model: Callable[..., nn.Module]) -> None:
    model = build_model("bert")
    attach(model, LoRA(r=2, target_modules=TARGETS), modules_to_save=["classifier"])
    expected = fingerprint(model)
    with torch.no_grad():
        model.get_parameter("classifier.weight").add_(1)
        assert fingerprint(model) == expected
        for name in ("bert.encoder.layer.1.attention.self.query.weight", "bert.embeddings.word_embeddings.weight"):
            model.get_parameter(name).mul_(1 + 1e-5)
            assert fingerprint(model) != expected
            model.get_parameter(name).div_(1 + 1e-5)


WITHOUT_WEIGHT = [
    BottleneckAdapter(style="parallel"),
    *(method(num_virtual_tokens=2) for method in (PromptTuning, PTuning, PrefixTuning, PTuningV2)),
]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("method", WITHOUT_WEIGHT, ids=lambda method: method.name)
def test_another_base_of_the_same_shape_is_noticed(method: Method, architecture: str) -> None:
    digests = []
    for seed in (0, 0, 1):
        model = build(architecture, seed=seed)
        attach_to_backbone(model, method)
        digests.append(fingerprint(model))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("method", [BottleneckAdapter(style="parallel"), PrefixTuning(num_virtual_tokens=2)])
def test_hosts_without_a_weight_stand_for_the_layers_in_them(method: Method) -> None:
    model = build("llama")
    attach_to_backbone(model, method)
    expected = fingerprint(model)
    perturb(model)
    assert fingerprint(model) == expected
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1 + 1e-5)
    assert fingerprint(model) != expected


def test_depends_on_hosts_and_shapes() -> None:
    digests = set()
    for width, targets in ((4, ["0"]), (4, ["1"]), (4, ["0", "1"]), (2, ["0"])):
        model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        attach(model, LoRA(r=1, target_modules=targets))
        digests.add(fingerprint(model))
    assert len(digests) == 4


def test_dtype_matters_only_where_values_do(build_model: Callable[..., nn.Module]) -> None:
    rounded, full = build_model("bert").bfloat16(), build_model("bert")
    widened = build_model("bert").bfloat16().float()
    for model in (rounded, full, widened):
        attach(model, LoRA(r=2, target_modules=TARGETS))
    assert fingerprint(rounded) == fingerprint(widened)
    assert fingerprint(rounded) != fingerprint(full)


def test_packed_hosts() -> None:
    import bitsandbytes

    digests = []
    for seed in (1, 1, 2):
        weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
        layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        model = nn.Sequential(layer.to("cpu"))
        attach(model, LoRA(r=1, target_modules=["0"]))
        digests.append(fingerprint(model))
    assert digests[0] == digests[1] != digests[2]


def test_check_names_both(build_model: Callable[..., nn.Module]) -> None:
    model, other = build_model("bert"), build_model("bert", 1)
    for one in (model, other):
        attach(one, LoRA(r=2, target_modules=TARGETS))
    expected = fingerprint(model)
    check_fingerprint(fingerprint(model), expected, "The folder")
    with pytest.raises(CheckpointError, match=f"The folder was trained on another base.*{expected[:12]}"):
        check_fingerprint(fingerprint(other), expected, "The folder")
