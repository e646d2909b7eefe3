"""PiSSA and OLoRA against PEFT, by A, B and effective weight before and after a step."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_lightning.adapters import attach, disabled, iter_adapters
from lora_lightning.errors import ConfigError
from lora_lightning.methods import DoRA, LoRA, LoRAFA
from tests.models import gap

RATE = 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))


def step(model: nn.Module) -> None:
    x, target = (torch.randn(9, width, generator=torch.Generator().manual_seed(width)) for width in (12, 6))
    (model(x) - target).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE).step()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_equals_peft(init):
    """PEFT takes the start out of its base weight; ours stays, so the effective weights are what must agree."""
    ours, theirs = network(), network()
    attach(ours, LoRA(r=3, alpha=6, init=init))
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=init, target_modules=["0", "2"])
    theirs = peft.get_peft_model(theirs, config)
    base = network().state_dict()
    for is_trained in (False, True):
        if is_trained:
            step(ours)
            step(theirs)
        for path, host, adapter in iter_adapters(ours):
            layer = theirs.base_model.model.get_submodule(path)
            reference = layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            effective = adapter.merged_weight(host, host.weight)
            assert gap(adapter.lora_A, layer.lora_A["default"].weight) <= 1e-5
            assert gap(adapter.lora_B, layer.lora_B["default"].weight) <= 1e-5
            assert gap(effective, reference) <= 1e-5
            assert torch.equal(host.weight, base[f"{path}.weight"])
            assert (gap(effective, host.weight) > 1e-4) == is_trained  # the control: the step shows


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", [LoRA, DoRA, LoRAFA])
def test_starts_at_the_base(init, kind):
    model, x = network(), torch.randn(5, 12)
    expected = model(x)
    attach(model, kind(r=3, alpha=6, init=init))
    assert gap(model(x), expected) <= 2e-6
    ((_, _, adapter), _) = iter_adapters(model)
    adapter.start_b.zero_()  # the control: the start is no small part of the weight
    assert gap(model(x), expected) > 0.1
    with disabled(model):
        assert torch.equal(model(x), expected)


def test_pissa_starts_at_the_largest_singular_values():
    model = network().double()
    attach(model, LoRA(r=3, alpha=6, init="pissa"))
    for _, host, adapter in iter_adapters(model):
        u, singular, vh = torch.linalg.svd(host.weight)
        best = u[:, :3] @ singular[:3].diag() @ vh[:3]
        assert gap(2 * adapter.lora_B @ adapter.lora_A, best) <= 1e-12
        assert gap(adapter.lora_A @ adapter.lora_A.t(), (singular[:3] / 2).diag()) <= 1e-12


def test_reset_returns_to_the_start():
    model = network()
    attach(model, LoRA(r=3, init="pissa"))
    ((_, _, adapter), _) = iter_adapters(model)
    before = copy.deepcopy(adapter.state_dict())
    step(model)
    assert not torch.equal(adapter.lora_A, before["lora_A"])
    adapter.reset_parameters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize(("host", "ids"), [(nn.Embedding(9, 6), True), (nn.Conv1d(4, 6, 3), False)])
def test_other_hosts(host, ids):
    model = nn.Sequential(host)
    x = torch.randint(9, (2, 5)) if ids else torch.randn(2, 4, 8)
    expected = model(x)
    attach(model, LoRA(r=2, init="pissa", target_modules=["0"]))
    assert gap(model(x), expected) <= 1e-6


def test_loftq_on_a_dense_host_is_refused():
    with pytest.raises(ConfigError, match="there is nothing to correct"):
        attach(network(), LoRA(r=2, init="loftq"))
