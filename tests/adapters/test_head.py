import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from lora_lightning.adapters import (
    Role,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    iter_adapters,
    iter_roles,
    merge,
)
from lora_lightning.adapters.frozen.copies import copied
from lora_lightning.errors import TargetError
from lora_lightning.methods import LoRA
from tests.adapters.toys import Bias, Model, ids
from tests.models import gap, perturb

QUERY = LoRA(r=2, target_modules=["query"])


def heads(model: nn.Module) -> list[str]:
    return [
        path for path, _, adapter in iter_adapters(model) if Role.HEAD in {role for *_, role in adapter.named_roles()}
    ]


def test_the_copy_trains_and_the_original_stays():
    model = Model()
    base, original = model(ids()), copy.deepcopy(model.head.state_dict())
    attach(model, QUERY, modules_to_save=["head"])
    assert torch.equal(model(ids()), base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids()).square().sum().backward()
    optimizer.step()
    assert gap(model(ids()), base) > 1e-2
    assert all(torch.equal(model.head.state_dict()[name], tensor) for name, tensor in original.items())
    assert all(gap(adapter_state_dict(model)[f"head.{name}"], tensor) > 1e-3 for name, tensor in original.items())
    with disabled(model):
        assert torch.equal(model(ids()), base)
    trained = model(ids())
    clone = copy.deepcopy(model)
    merge(clone)
    assert gap(clone(ids()), trained) <= 1e-5
    detach(model)
    assert torch.equal(model(ids()), base)


def test_the_copy_shares_nothing_with_the_original():
    model = Model()
    attach(model, QUERY, modules_to_save=["head"])
    pointers = {tensor.data_ptr() for name, tensor in model.head.state_dict().items() if "_lora_lightning" not in name}
    assert pointers.isdisjoint(tensor.data_ptr() for tensor in adapter_state_dict(model).values())


def test_names_of_all_sources_are_joined():
    model = Model()
    methods = [
        LoRA(r=2, target_modules=["query"], modules_to_save=["out"]),
        Bias(target_modules=["value"], modules_to_save=["norm", "out"]),
    ]
    attach(model, methods, modules_to_save=["embed"])
    assert heads(model) == ["embed", "layer.0.norm", "layer.1.norm", "head.out"]


def test_a_copy_inside_another_is_not_made():
    model = Model()
    attach(model, QUERY, modules_to_save=["head", "out"])
    assert heads(model) == ["head"]


def test_all_linear_leaves_out_every_copied_module():
    model = Model()
    report = attach(model, LoRA(r=2), modules_to_save=["head"])
    assert report.hosts == ("layer.0.query", "layer.0.value", "layer.1.query", "layer.1.value", "head")


def test_a_target_below_a_copy_is_refused():
    with pytest.raises(TargetError, match=r"'head.out' is both a target and in modules_to_save"):
        attach(Model(), LoRA(r=2, target_modules=["out"]), modules_to_save=["head"])


def test_a_delta_on_a_copied_module_merges_after_it():
    model = Model()
    attach(model, [QUERY, Bias(target_modules=["dense"])], modules_to_save=["out"])
    perturb(model)
    detach(model)
    host = nn.Sequential(nn.Linear(4, 4))
    attach(host, [DenseBias()], modules_to_save=["0"])
    expected = perturb(host)(x := torch.randn(3, 4))
    merge(host)
    assert gap(host(x), expected) <= 1e-5


class DenseBias(Bias):
    """A bias delta that may lie on a copied module."""

    def adapters(self, view):
        yield "0", next(iter(Bias(target_modules=["0"]).adapters(view)))[1]


def test_a_bfloat16_module_gets_a_float32_copy():
    model = Model().bfloat16()
    base = model(ids())
    attach(model, QUERY, modules_to_save=["head", "embed", "norm"])
    assert {tensor.dtype for tensor in adapter_state_dict(model).values()} == {torch.float32}
    output = model(ids())
    assert output.dtype is torch.bfloat16
    assert gap(output, base) <= 2e-2
    output.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for _, p, role in iter_roles(model) if role is Role.HEAD)
    perturb(model)
    expected = model(ids())
    merge(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert gap(model(ids()), expected) <= 3e-2


def test_under_autocast_the_copy_is_called_as_it_is():
    model = Model().bfloat16()
    attach(model, QUERY, modules_to_save=["out"])
    seen = []
    model.head.out._modules["_lora_lightning"]["head"].module.register_forward_pre_hook(
        lambda _, a: seen.append(a[0].dtype)
    )
    model(ids())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids()).dtype is torch.bfloat16
    assert seen == [torch.float32, torch.bfloat16]


def test_under_autocast_what_follows_a_copy_gets_the_dtype_of_the_original():
    """A copied embedding returns float32 under autocast, and a norm in bfloat16 takes none."""
    model = nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4), nn.Linear(4, 2)).bfloat16()
    attach(model, LoRA(r=1, target_modules=["2"]), modules_to_save=["0"])
    rows = torch.tensor([[1, 2]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(rows)
        with disabled(model):
            assert torch.equal(model(rows), expected)
        expected.sum().backward()
    assert model[0]._modules["_lora_lightning"]["head"].module.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="mixed dtype"):  # control
        model[1](model[0](rows).float())


def test_a_float64_module_gets_a_float64_copy():
    model = Model().double()
    attach(model, QUERY, modules_to_save=["head"])
    assert {tensor.dtype for tensor in adapter_state_dict(model).values()} == {torch.float64}
    assert model(ids()).dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_later_cast_of_the_whole_model(dtype):
    model = Model()
    attach(model, QUERY, modules_to_save=["norm", "out"])
    assert model.to(dtype)(ids()).dtype is dtype


def test_a_copy_on_the_meta_device():
    with torch.device("meta"):
        model = Model().bfloat16()
    attach(model, QUERY, modules_to_save=["out"])
    assert model(ids().to("meta")).is_meta


def test_a_module_without_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    report = attach(model, LoRA(r=2, target_modules=["0"]), modules_to_save=["1"])
    assert report.hosts == ("0", "1")
    model(torch.randn(2, 4))


def test_a_quantized_module_is_refused():
    model = nn.Sequential(nn.Linear(64, 64), Linear4bit(64, 64).to("cpu"))
    with pytest.raises(TargetError, match="copy of this Linear4bit cannot train, since 'weight' is stored quantized"):
        attach(model, LoRA(r=2, target_modules=["0"]), modules_to_save=["1"])
    assert type(model[0]) is nn.Linear


class History(nn.BatchNorm1d):
    """A norm whose running mean keeps the history of what it saw, as hand-written ones may."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x)
        if self.training:
            self.running_mean = self.running_mean * 0.9 + 0.1 * x.mean(0)
        return output


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_module_that_was_called_with_gradients_is_copied(norm):
    model = nn.Sequential(nn.Sequential(norm(nn.Linear(4, 4))), nn.Linear(4, 3))
    x = torch.randn(2, 4)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    model.eval()
    base = model(x).detach()
    attach(model, LoRA(r=2, target_modules=["1"]), modules_to_save=["0"])
    assert torch.equal(model(x), base)
    perturb(model)
    assert gap(model(x), base) > 1e-3
    trained = model(x).detach()
    clone = copied(model)
    merge(clone)
    assert gap(clone(x), trained) <= 1e-5


def test_a_norm_whose_statistics_have_a_history_is_copied():
    model = nn.Sequential(nn.Linear(4, 4), History(4), nn.Linear(4, 3))
    model(torch.randn(5, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    mean = model[1].running_mean.detach().clone()
    attach(model, LoRA(r=2, target_modules=["0"]), train_norm_statistics=True)
    assert torch.equal(adapter_state_dict(model)["1.running_mean"], mean)
    assert gap(mean, torch.zeros(4)) > 1e-4
