"""BitFit: the deltas get the gradients of the biases themselves, and errors where there is no bias."""

import copy

import pytest
import torch
from torch import nn

from lora_lightning.adapters import attach as attach_plain
from lora_lightning.adapters import iter_adapters
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.errors import ConfigError, NotMergeable, TargetError
from lora_lightning.methods import BitFit
from tests import models


def loss(model: nn.Module) -> torch.Tensor:
    return models.logits(model).square().mean()


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "roberta", "qwen2"])
def test_gradients_are_those_of_the_biases(architecture):
    reference = models.build(architecture).double()
    model = copy.deepcopy(reference)
    attach(model, BitFit())
    loss(model).backward()
    loss(reference).backward()
    biases = {
        name.removesuffix(".bias"): parameter.grad
        for name, parameter in reference.named_parameters()
        if name.endswith(".bias") and not name.startswith(("classifier", "pre_classifier"))
    }
    deltas = {path: adapter.delta.grad for path, _, adapter in iter_adapters(model)}
    assert deltas.keys() == biases.keys()
    ours, theirs = (torch.cat([grads[path] for path in biases]) for grads in (deltas, biases))
    assert models.gap(ours, theirs) <= 1e-12
    assert models.gap(torch.cat([deltas[path] for path in reversed(biases)]), theirs) > 1e-2


def test_a_subset():
    model = models.build("bert")
    report = attach(model, BitFit(bias=["query", "intermediate.dense"]))
    assert len(report.hosts) == 4
    assert report.num_trainable == 2 * (32 + 48)


def test_heads_are_left_out():
    model = models.build("roberta")  # its head holds a layer called dense
    assert not any(path.startswith("classifier") for path in attach(model, BitFit(bias=["dense"])).hosts)


def test_no_bias_is_an_error():
    with pytest.raises(TargetError, match=r"this model has none.*LlamaForCausalLM"):
        attach(models.build("llama"), BitFit())
    with pytest.raises(TargetError, match=r"no module is called 'qury'.*query"):
        attach(models.build("bert"), BitFit(bias=["qury"]))


@pytest.mark.parametrize("bias", ["query", []])
def test_settings(bias):
    with pytest.raises(ConfigError, match="'all' or a list"):
        BitFit(bias=bias)


def test_other_modules_are_left_out_with_a_warning():
    model = nn.Sequential(nn.Bilinear(4, 4, 5), nn.Linear(5, 5), nn.LayerNorm(5))
    with pytest.warns(UserWarning, match=r"0 \(Bilinear\)"):
        assert attach_plain(model, BitFit()).hosts == ("1", "2")


def test_merging_rounds_once():
    model = models.build("gpt2").bfloat16()
    attach(model, BitFit())
    models.perturb(model)
    before = {path: (host.bias.double(), adapter.delta.double()) for path, host, adapter in iter_adapters(model)}
    merge(model)
    for path, (bias, delta) in before.items():
        merged = model.get_submodule(path).bias
        assert torch.equal(merged, (bias + delta).float().bfloat16())
        assert not torch.equal(merged, bias.bfloat16())


def test_convolutions_and_norms_are_shifted_by_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.Flatten(2), nn.Conv1d(6, 4, 1))
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    assert attach_plain(model, BitFit()).hosts == ("0", "1", "2", "4")
    models.perturb(model)
    expected = model(x).detach()
    reference = copy.deepcopy(model)
    merge(reference)
    torch.testing.assert_close(reference(x), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(x[0:1])[0], model(x)[0], atol=1e-6, rtol=0)
    assert (expected - model[4].bias.view(1, -1, 1)).abs().max() > 0.1


def test_a_shift_where_there_is_no_bias():
    model = models.build("llama")
    base = models.logits(model).detach()
    attach(model, BitFit(bias=["q_proj"], add_bias=True))
    assert torch.equal(models.logits(model), base)
    models.perturb(model)
    assert (models.logits(model) - base).abs().max() > 1e-3
    with pytest.raises(NotMergeable, match="no bias to merge a shift into"):
        merge(model)
    with pytest.raises(ConfigError, match="add_bias needs a list"):
        BitFit(add_bias=True)
    with pytest.raises(TargetError, match="has none"):
        attach(models.build("llama"), BitFit(bias=["q_proj"]))


def test_a_head_is_shifted_where_it_is_named_whole():
    model = models.build("bert")
    assert attach(model, BitFit(bias=["classifier"])).hosts == ("classifier",)
    with pytest.raises(TargetError, match="outside its head"):
        attach(models.build("bert"), BitFit(bias=["classifier"], modules_to_save=["classifier"]))
