"""IA3 against PEFT with copied vectors, fused projections against the formula, and merging."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_lightning.adapters import attach as attach_plain
from lora_lightning.adapters import iter_adapters, iter_roles
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import IA3
from tests import models

# PEFT's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
NAMES = {
    "bert": (["key", "value"], ["1.output.dense"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
}
# In two blocks, where it is not six: fused projections, and an encoder with a decoder that attends twice.
NUM_HOSTS = {"gpt2": 4, "modernbert": 4, "t5": 16, "mt5": 16}


@torch.no_grad()
def copy_vectors(ours: nn.Module, theirs: nn.Module) -> None:
    for path, _, adapter in iter_adapters(ours):
        counterpart = theirs.base_model.model.get_submodule(path).ia3_l["default"]
        counterpart.copy_(adapter.ia3_l.view_as(counterpart))


@pytest.mark.parametrize("architecture", NAMES)
def test_equals_peft(architecture):
    targets, feedforward = NAMES[architecture]
    base = models.build(architecture)
    config = peft.IA3Config(target_modules=[*targets, *feedforward], feedforward_modules=feedforward)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    attach(base, IA3(target_modules=targets, feedforward_modules=feedforward))
    models.perturb(base)
    batch = models.inputs(base)
    expected = models.logits(base)
    assert models.gap(models.logits(theirs, batch), expected) > 1e-3
    copy_vectors(base, theirs)
    assert models.gap(models.logits(theirs, batch), expected) <= 1e-5
    for model in (base, theirs):
        models.logits(model, batch).square().mean().backward()
    for path, _, adapter in iter_adapters(base):
        counterpart = theirs.base_model.model.get_submodule(path).ia3_l["default"]
        assert models.gap(adapter.ia3_l.grad, counterpart.grad.flatten()) <= 1e-5


@pytest.mark.parametrize(("architecture", "fused"), [("gpt2", "attn.c_attn"), ("modernbert", "attn.Wqkv")])
@pytest.mark.parametrize("named", [True, False])
def test_only_keys_and_values_of_a_fused_projection(architecture, fused, named):
    model = models.build(architecture).double()
    attach(model, IA3(target_modules=[fused]) if named else IA3())
    models.perturb(model)
    hosts = [(host, adapter) for path, host, adapter in iter_adapters(model) if path.endswith(fused)]
    assert len(hosts) == 2
    for host, adapter in hosts:
        x = torch.randn(2, 5, 32, dtype=torch.float64)
        plain = x @ read_weight(host).t() + (0 if host.bias is None else host.bias)
        query, key, value = plain.split(32, dim=-1)
        key_scale, value_scale = adapter.ia3_l.split(32)
        assert models.gap(host(x), torch.cat([query, key * key_scale, value * value_scale], dim=-1)) <= 1e-12
        assert models.gap(host(x), torch.cat([query, key * value_scale, value * key_scale], dim=-1)) > 1e-3


@pytest.mark.parametrize("architecture", [*models.ARCHITECTURES, *models.RELATIVES])
def test_usual_places_of_every_architecture(architecture):
    model = models.build(architecture)
    before = models.logits(model)
    report = attach(model, IA3())
    assert len(report.hosts) == NUM_HOSTS.get(architecture, 6)
    assert models.gap(models.logits(model), before) <= 1e-6
    models.perturb(model)
    expected = models.logits(model)
    assert models.gap(expected, before) > 1e-3
    models.logits(model).square().mean().backward()
    assert all(adapter.ia3_l.grad.abs().max() > 0 for _, _, adapter in iter_adapters(model))
    merge(model)
    assert models.gap(models.logits(model), expected) <= 1e-5


def test_no_feedforward():
    report = attach(models.build("llama"), IA3(feedforward_modules=[]))
    assert all(path.endswith(("k_proj", "v_proj")) for path in report.hosts)
    assert report.num_trainable == 2 * (16 + 16)


def test_refusals():
    with pytest.raises(ConfigError, match="both in target_modules"):
        attach(models.build("llama"), IA3(target_modules=["down_proj"]))
    with pytest.raises(TargetError, match="no transformers model"):
        attach_plain(nn.Sequential(nn.Linear(4, 4)), IA3())
    other = models.build("llama")
    other.config.model_type = "falcon"
    with pytest.raises(TargetError, match=r"'falcon' is none of .*: bert, .*t5"):
        attach(other, IA3())
    attach(other, IA3(target_modules=["k_proj"], feedforward_modules=["down_proj"]))
    with pytest.raises(TargetError, match="is a Embedding"):
        attach_plain(nn.Sequential(nn.Embedding(4, 4)), IA3(target_modules=["0"], feedforward_modules=[]))


def test_plain_modules_by_name():
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    report = attach_plain(model, IA3(target_modules=["0"], feedforward_modules=["2"]))
    assert report.num_trainable == 12


def test_queries_are_scaled_on_request():
    own, all_of = models.build("gpt2"), models.build("gpt2")
    attach(own, IA3(feedforward_modules=[]))
    attach(all_of, IA3(feedforward_modules=[], scale_queries=True))
    sizes = [[parameter.numel() for _, parameter, _ in iter_roles(model)] for model in (own, all_of)]
    assert sizes == [[64, 64], [96, 96]]
    base = models.logits(models.build("gpt2")).detach()
    assert torch.equal(models.logits(all_of), base)
    models.perturb(all_of, std=0.5)
    expected = models.logits(all_of).detach()
    merge(all_of)
    torch.testing.assert_close(models.logits(all_of), expected, atol=1e-5, rtol=0)


def test_inputs_alone():
    model = models.build("llama")
    hosts = attach(model, IA3(target_modules=[], feedforward_modules=["down_proj"])).hosts
    assert [path.rpartition(".")[2] for path in hosts] == ["down_proj"] * 2
    with pytest.raises(ConfigError, match="target_modules is empty"):
        IA3(target_modules=[], feedforward_modules=[])
