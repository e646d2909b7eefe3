"""VeRA against PEFT and the formula, its shared projections, and what a checkpoint notices."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

from lora_lightning.adapters import adapter_state_dict, attach, iter_adapters, load_adapter_state_dict
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones.attach import attach as attach_to_backbone
from lora_lightning.backbones.attach import merge
from lora_lightning.errors import CheckpointError, ConfigError, TargetError
from lora_lightning.methods import VeRA
from lora_lightning.methods.vera import draw_projections
from tests import models

pytestmark = [
    # PEFT's own use of transformers, and its advice about tied embeddings.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
def test_equals_peft(architecture):
    """The layers differ in shape, so the pair is sliced; the same seed gives PEFT's very projections."""
    ours, theirs = models.build(architecture), models.build(architecture)
    batch, base = models.inputs(ours), models.logits(ours)
    hosts = attach_to_backbone(ours, VeRA(r=12, projection_seed=7, target_modules="all-linear")).hosts
    models.perturb(ours)
    settings = {"r": 12, "projection_prng_key": 7, "target_modules": list(hosts), "d_initial": 0.1}
    theirs = peft.get_peft_model(theirs, peft.VeraConfig(**settings, fan_in_fan_out=architecture == "gpt2"))
    layers = {path: theirs.base_model.model.get_submodule(path) for path in hosts}
    vectors = {}
    for path, _, adapter in iter_adapters(ours):
        vectors[f"{path}.d"] = adapter.lambda_d, layers[path].vera_lambda_d["default"]
        vectors[f"{path}.b"] = adapter.lambda_b, layers[path].vera_lambda_b["default"]
        assert torch.equal(adapter.projections.projection_a, layers[path].vera_A["default"])
        assert torch.equal(adapter.projections.projection_b, layers[path].vera_B["default"])
    with torch.no_grad():
        for own, counterpart in vectors.values():
            counterpart.copy_(own)
    outputs = [models.logits(model, batch) for model in (ours, theirs)]
    for output in outputs:
        output.square().mean().backward()
    assert models.gap(outputs[0], base) > 1e-2
    assert models.gap(*outputs) <= 1e-5
    for name, (own, counterpart) in vectors.items():
        assert models.gap(own.grad, counterpart.grad) <= 1e-5, name
    with torch.no_grad():  # the negative control: one element of one vector moved
        next(iter(vectors.values()))[0][0] += 1
        assert models.gap(models.logits(ours, batch), outputs[1]) > 1e-4


def test_equals_the_formula_in_float64():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10)).double()
    attach(model, VeRA(r=4))
    models.perturb(model)
    a, b = (matrix.double() for matrix in draw_projections(0, r=4, num_in=8, num_out=10))
    expected = {}
    for path, host, adapter in iter_adapters(model):
        out, num_in = host.weight.shape
        update = adapter.lambda_b.diag() @ b[:out] @ adapter.lambda_d.diag() @ a[:, :num_in]
        expected[path] = host.weight + update
    x = torch.randn(3, 8, dtype=torch.float64)
    hidden = nn.functional.linear(x, expected["0"], model[0].bias)
    reference = nn.functional.linear(hidden, expected["1"], model[1].bias)
    assert models.gap(model(x), reference) <= 1e-12
    merge(model)
    for path, weight in expected.items():
        assert models.gap(read_weight(model.get_submodule(path)), weight) <= 1e-12
        assert models.gap(weight, read_weight(model.get_submodule(path)).roll(1)) > 1e-2


def toy() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10))


def projections_of(model: nn.Module) -> list[nn.Module]:
    return [adapter.projections for _, _, adapter in iter_adapters(model)]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_one_pair_serves_all_layers(clone):
    model = toy()
    report = attach(model, VeRA(r=4))
    assert report.num_trainable == 4 + 6 + 4 + 10
    first, second = projections_of(clone(model))
    assert first is second
    assert first is not projections_of(model)[0]


@pytest.mark.parametrize("is_saved", [True, False])
def test_the_state_holds_the_projections_on_request(is_saved):
    model = toy()
    attach(model, VeRA(r=4, save_projection=is_saved))
    names = {name for name in adapter_state_dict(model) if "projections" in name}
    pair = {"0.projections.projection_a", "0.projections.projection_b"} if is_saved else set()
    assert names == {"0.projections.digest"} | pair


def test_the_pair_survives_every_conversion():
    model = toy()
    attach(model, VeRA(r=4))
    a, b = draw_projections(0, r=4, num_in=8, num_out=10)
    (shared, _) = projections_of(model)
    digest = shared.digest.clone()
    for convert in (lambda: model.double(), lambda: model.to_empty(device="cpu"), lambda: model.float()):
        convert()
        assert torch.equal(shared.projection_a.float(), a)
        assert torch.equal(shared.projection_b.float(), b)
        assert torch.equal(shared.digest, digest)
    model.to("meta")
    assert shared.projection_a.is_meta
    model.to_empty(device="cpu")
    assert torch.equal(shared.projection_a, a)
    assert torch.equal(shared.digest, digest)
    assert not torch.equal(draw_projections(1, r=4, num_in=8, num_out=10)[0], a)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    draw_projections(0, r=4, num_in=8, num_out=10)
    assert torch.equal(torch.rand(2), expected)


def test_another_draw_is_noticed():
    model, other = toy(), toy()
    attach(model, VeRA(r=4))
    attach(other, VeRA(r=4, projection_seed=1))
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(other).items()}
    with pytest.raises(CheckpointError, match="other random projections than projection_seed=1"):
        load_adapter_state_dict(other, adapter_state_dict(models.perturb(model)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(other).items())


def test_saved_projections_replace_another_draw():
    model = toy()
    other = copy.deepcopy(model)
    attach(model, VeRA(r=4, save_projection=True))
    attach(other, VeRA(r=4, save_projection=True, projection_seed=1))
    x = torch.randn(3, 8)
    expected = models.perturb(model)(x)
    assert models.gap(models.perturb(other)(x), expected) > 1e-3
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1"),
        ({"d_initial": 0}, "d_initial must be a finite number above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"projection_seed": -1}, "projection_seed must be an integer from 0"),
        ({"projection_seed": True}, "projection_seed must be an integer from 0"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        VeRA(**settings)


@pytest.mark.parametrize("host", [nn.Embedding(9, 4), nn.Conv1d(4, 6, 3)])
def test_other_hosts_are_refused_by_name(host):
    with pytest.raises(TargetError, match="VeRA: '0' is of kind"):
        attach(nn.Sequential(host), VeRA(target_modules=["0"]))
