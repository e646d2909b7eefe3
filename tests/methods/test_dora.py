"""DoRA's magnitude and norm; equality with the formula is in test_peft_parity."""

import copy

import pytest
import torch
from torch import nn

from lora_lightning.adapters import attach, iter_adapters
from lora_lightning.adapters.functional import norms
from lora_lightning.adapters.functional.norms import Stamp
from lora_lightning.methods import DoRA
from tests.models import gap, perturb


def adapted(host: nn.Module, **settings) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(host)
    attach(model, DoRA(r=2, target_modules=["0"], **settings))
    ((_, _, adapter),) = iter_adapters(model)
    return model, adapter


def formula(model: nn.Module, adapter: nn.Module, x: torch.Tensor) -> torch.Tensor:
    dim = 1 if adapter.axis == "output" else 0
    direction = model[0].weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
    return nn.functional.linear(
        x, adapter.magnitude.unsqueeze(dim) * direction / direction.norm(dim=dim, keepdim=True), model[0].bias
    )


@pytest.mark.parametrize(("axis", "dim"), [("output", 1), ("input", 0)])
def test_the_magnitude_starts_at_the_norm(axis, dim):
    model, adapter = adapted(nn.Linear(8, 6), magnitude_axis=axis)
    torch.testing.assert_close(adapter.magnitude, model[0].weight.norm(dim=dim))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (nn.Embedding(9, 4), lambda w: w.norm(dim=0)),
        (nn.Conv1d(4, 6, 3), lambda w: w.flatten(1).norm(dim=1)),
        (nn.Conv2d(4, 6, 3, groups=2), lambda w: w.flatten(1).norm(dim=1)),
    ],
)
def test_the_magnitude_of_other_hosts(host, expected):
    model, adapter = adapted(host)
    torch.testing.assert_close(adapter.magnitude, expected(model[0].weight))


@pytest.mark.parametrize("axis", ["output", "input"])
def test_the_norm_follows_reloaded_base_weights(axis):
    model, adapter = adapted(nn.Linear(8, 6), magnitude_axis=axis)
    perturb(model)
    x = torch.randn(3, 8)
    first = model(x)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in nn.Linear(8, 6).state_dict().items()}, strict=False)
    assert gap(model(x), first) > 1e-2
    assert gap(model(x), formula(model, adapter, x)) <= 1e-5
    model[0].weight.data = torch.randn(6, 8)
    assert gap(model(x), formula(model, adapter, x)) <= 1e-5


def test_the_norm_is_not_recomputed_for_nothing(monkeypatch):
    model, adapter = adapted(nn.Linear(8, 6))
    model(torch.randn(3, 8))
    calls = []
    monkeypatch.setattr(norms, "Stamp", lambda tensor: calls.append(tensor) or Stamp(tensor))
    model(torch.randn(3, 8))
    assert not calls
    model[0].weight.data = model[0].weight.data * 2
    model(torch.randn(3, 8))
    assert len(calls) == 1
    assert adapter.state_dict().keys() == {"lora_A", "lora_B", "magnitude"}


def test_the_norm_is_float32_in_a_bfloat16_model():
    """A norm in bfloat16 would be off by up to 0.4 %."""
    model, adapter = adapted(nn.Linear(256, 64))
    perturb(model, std=0.02)
    model.bfloat16()
    norm = adapter.norm(model[0])
    direction = model[0].weight.double() + adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    assert norm.dtype is torch.float32
    assert gap(norm, direction.norm(dim=1)) <= 1e-5


def test_the_gradient_through_the_norm_is_cut():
    model, adapter = adapted(nn.Linear(8, 6).double())
    perturb(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    ((_, _, other),) = iter_adapters(twin)
    formula(twin, other, x).square().sum().backward()  # through the norm
    assert gap(adapter.magnitude.grad, other.magnitude.grad) <= 1e-10
    assert gap(adapter.lora_B.grad, other.lora_B.grad) > 1e-2


def test_a_row_of_zeros_stays_zero_without_nan():
    host = nn.Linear(8, 6)
    nn.init.zeros_(host.weight[2:3])
    model, adapter = adapted(host)
    output = model(torch.randn(3, 8))
    output.square().sum().backward()
    assert torch.equal(output[:, 2], host.bias[2].expand(3))
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


@pytest.mark.parametrize("axis", ["output", "input"])
def test_dropout_is_on_the_input_of_a_alone(axis):
    """With B at zero dropout changes nothing, since the base part sees the whole input."""
    model, _ = adapted(nn.Linear(64, 6), magnitude_axis=axis, dropout=0.5)
    x = torch.randn(3, 64)
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    perturb(model)
    assert gap(model.train()(x), model.eval()(x)) > 1e-3
