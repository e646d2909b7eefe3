import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from lora_lightning.adapters import attach, is_attached, merge
from lora_lightning.errors import NotMergeable
from lora_lightning.methods import DoRA, LoRA
from tests.adapters.toys import Model, ids
from tests.models import gap, perturb

KINDS = pytest.mark.parametrize("kind", [LoRA, DoRA])


@KINDS
def test_merged_equals_adapted(kind):
    model = Model()
    base, keys = model(ids()), list(model.state_dict())
    attach(model, kind(r=2, target_modules=["query", "value", "embed"], modules_to_save=["out"]))
    expected = perturb(model)(ids())
    merge(model)
    assert gap(expected, base) > 1e-2
    assert gap(model(ids()), expected) <= 1e-5
    assert list(model.state_dict()) == keys
    assert not is_attached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@KINDS
def test_untouched_weights_keep_every_bit(kind):
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, kind(r=2, target_modules=["layer.0.query"]))
    perturb(model)
    merge(model)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["layer.0.query.weight"]


@KINDS
def test_the_arithmetic_is_wider_than_the_weight(kind):
    """In bfloat16 throughout, an update this small would be lost more often."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    weight = model[0].weight.detach().clone()
    attach(model, kind(r=4, alpha=4))
    adapter = model[0]._modules["_lora_lightning"][kind.name]
    nn.init.normal_(adapter.lora_B, std=1e-2)
    direction = weight.double() + adapter.lora_B.double() @ adapter.lora_A.double()
    if kind is DoRA:
        direction *= (adapter.magnitude.double() / direction.norm(dim=1))[:, None]
    merge(model)
    assert model[0].weight.dtype is torch.bfloat16
    agree = (model[0].weight == direction.bfloat16()).float().mean()
    assert agree > 0.999
    assert (model[0].weight != weight).float().mean() > 0.3


@KINDS
def test_float64_stays_float64(kind):
    model = Model().double()
    attach(model, kind(r=2, target_modules=["query"]))
    expected = perturb(model)(ids())
    merge(model)
    assert gap(model(ids()), expected) <= 1e-12


@KINDS
def test_a_quantized_host_is_refused_and_nothing_changes(kind):
    quantized = Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    quantized.support_avx512bf16_for_cpu = False
    model = nn.Sequential(nn.Linear(64, 64), quantized.to("cpu"))
    attach(model, kind(r=2, target_modules=["0", "1"]))
    x = torch.randn(3, 64)
    expected = perturb(model)(x)
    with pytest.raises(NotMergeable, match="Linear4bit stores its weight quantized, and rounding would swallow"):
        merge(model)
    assert is_attached(model)
    assert torch.equal(model(x), expected)


def test_merging_nothing_changes_nothing():
    model = Model()
    before = model(ids())
    merge(model)
    assert torch.equal(model(ids()), before)
