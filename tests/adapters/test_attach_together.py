"""Several adapters on a model: on one host, merged together, and those of which a model takes one."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lora_lightning.adapters import (
    adapter_state_dict,
    attach,
    detach,
    is_attached,
    iter_adapters,
    iter_roles,
    merge,
)
from lora_lightning.errors import ConfigError, NotMergeable
from lora_lightning.methods import LoRA
from tests.adapters.toys import Bias, Model, Scale, fingerprint, ids
from tests.models import gap, perturb


@pytest.mark.parametrize("order", [1, -1])
def test_two_methods_on_one_host(order):
    model = Model()
    base, before = model(ids()), fingerprint(model)
    methods = [LoRA(r=2, target_modules=["query"]), Bias(target_modules=["query"]), Scale(target_modules=["query"])]
    attach(model, methods[::order])
    assert torch.equal(model(ids()), base)
    assert set(adapter_state_dict(model)) >= {"layer.0.query.lora_A", "layer.0.query.delta", "layer.0.query.scale"}
    perturb(model)
    host = model.layer[0].query
    parts = {type(adapter).__name__: adapter for path, _, adapter in iter_adapters(model) if path == "layer.0.query"}
    lora, delta, scale = parts["LowRankAdapter"], parts["BiasDelta"].delta, parts["InputScale"].scale
    x = torch.randn(3, 8)
    weight = host.weight + lora.scaling * lora.lora_B @ lora.lora_A
    assert gap(host(x), (x * scale) @ weight.t() + host.bias + delta) <= 1e-5
    model(ids()).square().sum().backward()
    assert all(parameter.grad is not None for _, parameter, _ in iter_roles(model))
    assert model.layer[0].value.weight.grad is None
    detach(model)
    assert fingerprint(model) == before
    assert torch.equal(model(ids()), base)


def test_two_methods_merge_together():
    model = Model()
    attach(model, [Bias(target_modules=["query", "dense"]), LoRA(r=2, target_modules=["query"])])
    expected = perturb(model)(ids())
    merge(model)
    assert gap(model(ids()), expected) <= 1e-5
    assert not is_attached(model)


def test_one_that_cannot_merge_stops_all():
    model = Model()
    attach(model, [LoRA(r=2, target_modules=["query"]), Scale(target_modules=["dense"])])
    expected, before = perturb(model)(ids()), fingerprint(model)
    with pytest.raises(NotMergeable, match="InputScale changes more than a weight and cannot be merged"):
        merge(model)
    assert fingerprint(model) == before
    assert torch.equal(model(ids()), expected)


@dataclass(frozen=True, kw_only=True)
class Front(Bias):
    name: ClassVar[str] = "front"
    exclusive: ClassVar[str | None] = "the soft prompt"


@dataclass(frozen=True, kw_only=True)
class OtherFront(Front):
    name: ClassVar[str] = "other_front"


def test_methods_that_exclude_each_other():
    model = Model()
    keys = list(model.state_dict())
    methods = [Front(target_modules=["0.query"]), LoRA(r=2), OtherFront(target_modules=["1.query"])]
    with pytest.raises(ConfigError, match="Front and OtherFront both provide the soft prompt, of which a model takes"):
        attach(model, methods)
    assert list(model.state_dict()) == keys
    attach(model, methods[:2])
    detach(model)
    attach(model, methods[1:])


def test_the_same_exclusive_method_twice():
    with pytest.raises(ConfigError, match="Front and Front both provide"):
        attach(Model(), [Front(target_modules=["0.query"]), Front(target_modules=["1.query"])])
