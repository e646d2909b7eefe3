"""Delta-LoRA against a simulation in float64 that really moves W from step to step."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import adapter_state_dict, attach, iter_adapters, load_adapter_state_dict
from lora_lightning.errors import ConfigError
from lora_lightning.methods import DeltaLoRA
from tests.models import gap

RATIO, START, STEPS, RATE = 0.7, 2, 6, 0.05
METHOD = DeltaLoRA(r=2, alpha=4, delta_ratio=RATIO, start_step=START, target_modules="all-linear")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return tuple(torch.randn(7, width, generator=generator, dtype=torch.float64) for width in (6, 4))


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def train(model: nn.Module, first: int, last: int, method: DeltaLoRA = METHOD) -> None:
    """Take SGD steps `first` to `last` - 1, with the method's hook after each, as a task does."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(first, last):
        x, target = batch(step)
        optimizer.zero_grad()
        loss_of(model(x), target).backward()
        optimizer.step()
        method.after_step(model, step, STEPS)


@dataclass
class Layer:
    """One layer of the simulation: W is written in each step."""

    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    scaling: float

    def __call__(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.scaling * self.b @ self.a).t() + self.bias


def simulate(layers: list[Layer], start: int = START, ratio: float = RATIO) -> Tensor:
    """Train with a W that moves by λ s (B_{t+1} A_{t+1} - B_t A_t) after `start` steps; return the gradients of x."""
    for step in range(STEPS):
        x, target = batch(step)
        x.requires_grad_()
        for layer in layers:
            layer.a.requires_grad_()
            layer.b.requires_grad_()
        loss = loss_of(layers[1](layers[0](x).tanh()), target)
        parameters = [tensor for layer in layers for tensor in (layer.a, layer.b)]
        grads = iter(torch.autograd.grad(loss, parameters))
        for layer in layers:
            before = (layer.b @ layer.a).detach()
            layer.a = (layer.a - RATE * next(grads)).detach()
            layer.b = (layer.b - RATE * next(grads)).detach()
            if step >= start:
                layer.weight = layer.weight + ratio * layer.scaling * (layer.b @ layer.a - before)
    x, target = batch(STEPS)
    x.requires_grad_()
    return torch.autograd.grad(loss_of(layers[1](layers[0](x).tanh()), target), x)[0]


def layers_of(model: nn.Module) -> list[Layer]:
    return [
        Layer(host.weight.clone(), host.bias, adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone(), 2.0)
        for _, host, adapter in iter_adapters(model)
    ]


def largest_gap(model: nn.Module, layers: list[Layer], dx: Tensor) -> float:
    """Compare effective weights, factors, and the gradient of the input."""
    x, target = batch(STEPS)
    x.requires_grad_()
    (own,) = torch.autograd.grad(loss_of(model(x), target), x)
    gaps = [gap(own, dx)]
    for (_, host, adapter), layer in zip(iter_adapters(model), layers, strict=True):
        effective = layer.weight + layer.scaling * layer.b @ layer.a
        gaps += [gap(adapter.merged_weight(host, host.weight), effective)]
        gaps += [gap(adapter.lora_A, layer.a), gap(adapter.lora_B, layer.b)]
    return max(gaps)


def test_equals_a_weight_that_really_moves():
    model = network()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, METHOD)
    simulated, plain, early = layers_of(model), layers_of(model), layers_of(model)
    train(model, 0, STEPS)
    assert largest_gap(model, simulated, simulate(simulated)) <= 1e-10
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert largest_gap(model, plain, simulate(plain, ratio=0.0)) > 1e-4  # LoRA
    assert largest_gap(model, early, simulate(early, start=START - 1)) > 1e-4


def test_without_warm_up_w_moves_from_the_first_step():
    model = network()
    method = DeltaLoRA(r=2, alpha=4, delta_ratio=RATIO, start_step=0)
    attach(model, method)
    simulated, late = layers_of(model), layers_of(model)
    train(model, 0, STEPS, method)
    assert largest_gap(model, simulated, simulate(simulated, start=0)) <= 1e-10
    assert largest_gap(model, late, simulate(late, start=1)) > 1e-5


@pytest.mark.parametrize("at", [1, START, 4])
def test_a_resumed_run_goes_on_as_the_first(at):
    model = network()
    attach(model, METHOD)
    train(model, 0, at)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    train(model, at, STEPS)

    other = network()
    torch.manual_seed(9)
    attach(other, METHOD)
    unresumed = copy.deepcopy(other)
    load_adapter_state_dict(other, state)
    train(other, at, STEPS)
    train(unresumed, at, STEPS)
    final = adapter_state_dict(model)
    assert all(torch.equal(tensor, final[name]) for name, tensor in adapter_state_dict(other).items())
    assert any(not torch.equal(tensor, final[name]) for name, tensor in adapter_state_dict(unresumed).items())


def test_before_the_start_it_is_lora():
    model = network()
    attach(model, METHOD)
    train(model, 0, START - 1)
    ((_, host, adapter), _) = iter_adapters(model)
    assert not adapter.anchor_a.any()
    assert gap(adapter.merged_weight(host, host.weight), host.weight + 2 * adapter.lora_B @ adapter.lora_A) <= 1e-12
    train(model, START - 1, START)
    assert torch.equal(adapter.anchor_a, adapter.lora_A)


@pytest.mark.parametrize("start_step", [0, 1])
def test_with_a_start_in_the_weight(start_step):
    """With PiSSA, W' = W + s (B A - B0 A0) + λ s (B A - B_K A_K): the λ term does not know of A0 and B0."""
    method = DeltaLoRA(r=2, alpha=4, delta_ratio=RATIO, start_step=start_step, init="pissa")
    model, x = network(), batch(0)[0]
    expected = model(x)
    attach(model, method)
    assert gap(model(x), expected) <= 1e-12
    ((_, host, adapter), _) = iter_adapters(model)
    if start_step:
        method.after_step(model, start_step - 1, STEPS)
    start = (adapter.lora_B @ adapter.lora_A).detach()
    with torch.no_grad():
        adapter.lora_A.add_(0.1)
    moved = adapter.lora_B @ adapter.lora_A - start
    assert gap(adapter.merged_weight(host, host.weight), host.weight + (1 + RATIO) * 2 * moved) <= 1e-12
    assert gap(host.weight + 2 * moved, host.weight + (1 + RATIO) * 2 * moved) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 0.1}, "dropout must be 0, got 0.1: the weight moves by the change"),
        ({"delta_ratio": 0}, "delta_ratio must be a finite number above 0"),
        ({"start_step": -1}, "start_step must be an integer of at least 0"),
        ({"start_step": 1.5}, "start_step must be an integer of at least 0"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        DeltaLoRA(**settings)
