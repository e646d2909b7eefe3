"""DoRA's kept ‖W‖ follows every change of the weight that torch lets one see, and `refresh` the rest."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import attach, merge, refresh
from lora_lightning.adapters import adapter_state_dict, load_adapter_state_dict
from lora_lightning.adapters.functional import norms
from lora_lightning.adapters.functional.norms import Stamp
from lora_lightning.methods import DoRA
from tests.models import gap, perturb


def assign_twice(layer):
    """Free the first storage before the second one is drawn, which may then get its address."""
    layer.weight.data = layer.weight.data * 3
    layer.weight.data = layer.weight.data * 2


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(3)


def load(layer):
    layer.load_state_dict({"weight": layer.weight * 3}, strict=False)


def load_by_assigning(layer):
    layer.load_state_dict({"weight": layer.weight.detach() * 3}, strict=False, assign=True)


def another_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 3, requires_grad=False)


def another_layout(layer):
    layer.weight.data = layer.weight.data.t()


def part_of_a_storage(layer):
    both = torch.cat([layer.weight.data * 2, layer.weight.data * 3])
    layer.weight.data = both[: len(layer.weight)]
    layer(torch.ones(1, 8))
    layer.weight.data = both[len(layer.weight) :]


def from_a_vector(layer):
    nn.utils.vector_to_parameters(layer.weight.flatten() * 3, [layer.weight])


def by_an_optimizer(layer):
    layer.weight.requires_grad_()
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.3).step()
    layer.weight.requires_grad_(requires_grad=False)


def through_double(layer):
    layer.double()
    layer.weight.data.mul_(3)
    layer.float()


CHANGES = [
    *(assign_twice, in_place, load, load_by_assigning, another_parameter, another_layout, part_of_a_storage),
    *(from_a_vector, by_an_optimizer, through_double),
]
HOSTS = {"linear": lambda: nn.Linear(8, 8), "transposed": lambda: Conv1D(8, 8)}
X = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))  # one token: the weight is not rebuilt


def adapted(host="linear", axis="output"):
    torch.manual_seed(0)
    model = nn.Sequential(HOSTS[host]())
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(1, 2, 8)[:, None])  # rows and columns of different norms
    attach(model, DoRA(r=2, target_modules=["0"], magnitude_axis=axis))
    perturb(model)
    model(X)
    return model


def expected(model):
    """Return what a fresh attachment on the same weights, with the same adapter, answers."""
    torch.manual_seed(0)
    fresh = nn.Sequential(HOSTS["transposed" if isinstance(model[0], Conv1D) else "linear"]())
    own = {name: tensor for name, tensor in model.state_dict().items() if "_lora_lightning" not in name}
    fresh.load_state_dict({name: tensor.clone() for name, tensor in own.items()})
    (method,) = {adapter.axis for adapter in model[0]._lora_lightning.children()}
    attach(fresh, DoRA(r=2, target_modules=["0"], magnitude_axis=method))
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    return fresh(X)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(change, host, axis):
    model = adapted(host, axis)
    before = model(X).detach()
    change(model[0])
    answer = model(X)
    assert gap(answer, expected(model)) < 1e-6
    assert gap(answer, before) > 1e-3


@pytest.mark.parametrize("host", HOSTS)
def test_merging_is_followed_by_the_next_adapter(host):
    model = adapted(host)
    model(X)  # keeps the norm of the weight before the merge
    before = model[0].weight.clone()
    merge(model)
    assert gap(model[0].weight, before) > 1e-3
    attach(model, DoRA(r=2, target_modules=["0"]))
    perturb(model)
    assert gap(model(X), expected(model)) < 1e-6


@pytest.mark.parametrize("host", HOSTS)
def test_writes_through_data_take_a_refresh(host):
    model = adapted(host)
    model[0].weight.data.mul_(3)
    assert gap(model(X), expected(model)) > 1e-3, "if torch tells of these writes, refresh is not needed any longer"
    refresh(model)
    assert gap(model(X), expected(model)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize(
    ("host", "backend"),
    [("linear", "aot_eager"), ("transposed", "aot_eager"), ("linear", "inductor"), ("transposed", "inductor")],
)
def test_compiled_models_follow(host, backend):
    torch._dynamo.reset()
    for change in (in_place, load, assign_twice, another_layout):
        model = adapted(host)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        before = compiled(X).detach()
        change(model[0])
        assert gap(compiled(X), expected(model)) < 1e-5
        assert gap(compiled(X), before) > 1e-3


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_norms_of_their_own(clone):
    model = adapted()
    answer = model(X).detach()
    twin = clone(model)
    in_place(twin[0])
    assert gap(twin(X), expected(twin)) < 1e-6
    assert gap(model(X), answer) < 1e-6
    assert gap(twin(X), answer) > 1e-3


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = adapted()
        assert gap(model(X), expected(model)) < 1e-6


def test_what_is_gone_is_not_kept():
    norms.forget_kept_norms()
    for _ in range(3):
        adapted()
    assert len(norms._KEPT) == 1
    layers = [adapted() for _ in range(3)]
    assert len(norms._KEPT) <= len(layers) + 1


def test_a_stamp_fits_until_its_tensor_changes():
    tensor = torch.zeros(4)
    stamp = Stamp(tensor)
    assert stamp.fits(tensor)
    assert not stamp.fits(torch.zeros(4))
    tensor.add_(1)
    assert not stamp.fits(tensor)
    assert not stamp.has_expired
    del tensor
    assert stamp.has_expired
