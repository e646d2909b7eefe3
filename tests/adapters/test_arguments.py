"""Hosts that are called by the names of their arguments."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import attach
from lora_lightning.adapters.arguments import by_position
from lora_lightning.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRADrop,
    LoRAFA,
    VeRA,
)
from tests import models
from tests.models import gap, perturb


class Own(nn.Linear):
    """A linear layer of somebody's own, which inherits its forward."""


class Called(nn.Module):
    """Calls its layer by the name of its argument, or by position."""

    def __init__(self, layer, name, value):
        super().__init__()
        self.layer, self.name, self.value = layer, name, value

    def forward(self, by_name=True):
        return self.layer(**{self.name: self.value}) if by_name else self.layer(self.value)


def build(kind):
    torch.manual_seed(0)
    layer, name, value = {
        "linear": lambda: (nn.Linear(6, 6), "input", torch.randn(3, 6)),
        "subclass": lambda: (Own(6, 6), "input", torch.randn(3, 6)),
        "conv1d of transformers": lambda: (Conv1D(6, 6), "x", torch.randn(3, 6)),
        "embedding": lambda: (nn.Embedding(9, 6), "input", torch.tensor([[1, 2, 8]])),
        "convolution": lambda: (nn.Conv2d(3, 6, 3), "input", torch.randn(2, 3, 5, 5)),
        "sequence": lambda: (nn.Conv1d(3, 6, 3), "input", torch.randn(2, 3, 5)),
    }[kind]()
    return Called(layer, name, value)


CASES = [
    *[(kind, method) for kind in ("embedding", "convolution", "sequence") for method in (LoRA, DoRA)],
    *[
        (kind, method)
        for kind in ("linear", "subclass", "conv1d of transformers")
        for method in (LoRA, DoRA, DeltaLoRA, LoRADrop, LoRAFA, VeRA)
    ],
]
METHODS = [
    *[(kind, method(r=2, target_modules=["layer"])) for kind, method in CASES],
    ("linear", AdaLoRA(target_r=2, target_modules=["layer"])),
    ("linear", IA3(target_modules=["layer"], feedforward_modules=[])),
    ("linear", BitFit()),
]


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_a_name_means_what_the_position_does(kind, method):
    model = build(kind)
    plain = model().detach()
    attach(model, method)
    perturb(model, std=0.5)
    expected = model(by_name=False)
    assert gap(model(), expected) < 1e-6
    assert gap(plain, expected) > 1e-3


def test_the_input_of_a_feedforward_layer_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.down(input=self.up(input=x))

    model = Net()
    attach(model, IA3(target_modules=["up"], feedforward_modules=["down"]))
    before = model(torch.ones(1, 4)).detach()
    perturb(model, std=0.5)
    assert gap(model(torch.ones(1, 4)), before) > 1e-3


@pytest.mark.parametrize(
    ("name", "path", "names"),
    [
        ("llama", "model.layers.0.mlp", ["x"]),
        ("bert", "bert.encoder.layer.0.output", ["hidden_states", "input_tensor"]),
    ],
)
def test_bottlenecks_take_names(name, path, names):
    model = models.build(name)
    module = model.get_submodule(path)
    values = [torch.randn(1, 2, width) for width in ([32] if name == "llama" else [48, 32])]
    plain = module(*values).detach()
    attach(model, BottleneckAdapter(style="parallel"))
    perturb(model, std=0.5)
    expected = module(*values)
    assert torch.equal(module(**dict(zip(names, values, strict=True))), expected)
    assert torch.equal(module(*values[:1], **dict(zip(names[1:], values[1:], strict=True))), expected)
    assert gap(plain, expected) > 1e-3


def test_experts_take_names():
    model = models.build("mixtral")
    attach(model, LoRA(r=2, target_modules=["experts"]))
    perturb(model, std=0.5)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    hidden, index, weights = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    expected = experts(hidden, index, weights)
    by_name = {"top_k_weights": weights, "hidden_states": hidden, "top_k_index": index}
    assert torch.equal(experts(**by_name), expected)
    assert torch.equal(experts(hidden, top_k_weights=weights, top_k_index=index), expected)


def test_a_copy_gets_the_names_as_they_are():
    class Named(nn.Linear):
        def forward(self, *, features):
            return super().forward(features)

    model = nn.ModuleDict({"layer": Named(4, 4), "other": nn.Linear(4, 4)})
    before = model["layer"](features=torch.ones(2, 4))
    attach(model, LoRA(r=1, target_modules=["other"]), modules_to_save=["layer"])
    assert gap(model["layer"](features=torch.ones(2, 4)), before) < 1e-6


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", [LoRA(r=2, target_modules=["layer"]), DoRA(r=2, target_modules=["layer"])])
def test_compiled_calls_by_name(method):
    model = build("linear")
    attach(model, method)
    perturb(model, std=0.5)
    expected = model(by_name=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert gap(compiled(), expected) < 1e-6


def test_gaps_end_what_goes_by_position():
    assert by_position(("a", "b"), (), {"b": 1}) == ((), {"b": 1})
    assert by_position((), (1,), {"b": 1}) == ((1,), {"b": 1})
