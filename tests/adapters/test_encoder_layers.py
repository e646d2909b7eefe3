"""Adapters inside torch's own transformer layers, whose fast path reads weights."""

import copy

import pytest
import torch
from torch import nn

from lora_lightning.adapters import (
    attach,
    detach,
    disabled,
    require_calls,
)
from lora_lightning.errors import TargetError
from lora_lightning.methods import DoRA, LoRA
from tests.adapters.toys import Bias, fingerprint
from tests.models import gap, perturb


class Encoder(nn.Module):
    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, x, mask=None):
        return self.encoder(x, src_key_padding_mask=mask)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4:], mask[1, 5:] = True, True
    return torch.randn(3, 6, 8), mask


# torch says so whenever it packs a padded batch, which is what is tested here.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize(
    "method", [LoRA(r=2), DoRA(r=2), Bias(target_modules=["linear2"])], ids=["lora", "dora", "bias"]
)
def test_encoder_layers_use_adapters_in_evaluation(nested, with_mask, method):
    model = Encoder(nested=nested)
    (x, mask), before = padded(), fingerprint(model)
    mask = mask if with_mask else None
    keep = slice(None) if mask is None else ~mask
    with torch.no_grad():
        base = model.eval()(x, mask)[keep]
    assert "self_attn.out_proj" not in str(attach(model, method).hosts)
    perturb(model, std=0.5)
    with torch.no_grad():
        trained = model.train()(x, mask)[keep]
        with require_calls(model):
            evaluated = model.eval()(x, mask)[keep]
        assert gap(evaluated, trained) <= 1e-5
        assert gap(evaluated, base) > 1e-2
    assert torch.equal(copy.deepcopy(model)(x, mask)[keep], model(x, mask)[keep])

    # The negative control: without the hooks torch reads the weights directly and the adapters vanish.
    silenced = copy.deepcopy(model)
    for module in silenced.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = nested
    with torch.no_grad():
        assert gap(silenced(x, mask)[keep], trained) > 1e-2

    detach(model.train())
    assert fingerprint(model) == before


def test_a_single_encoder_layer_as_the_model():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    attach(model, LoRA(r=2))
    perturb(model)
    x = torch.randn(3, 6, 8)
    with torch.no_grad():
        assert gap(model.eval()(x), model.train()(x)) <= 1e-5


def test_attention_output_is_refused_by_name():
    model = Encoder(nested=False)
    with pytest.raises(TargetError, match=r"'encoder.layers.0.self_attn.out_proj' is never called"):
        attach(model, LoRA(r=2, target_modules=["linear1", "out_proj"]))
    with pytest.raises(TargetError, match=r"out_proj' is never called.*Leave it out of modules_to_save"):
        attach(model, LoRA(r=2, target_modules=["linear1"], modules_to_save=["out_proj"]))
    report = attach(model, LoRA(r=2, target_modules=["linear1", "out_proj"], exclude_modules=["self_attn"]))
    assert report.hosts == ("encoder.layers.0.linear1", "encoder.layers.1.linear1")


@pytest.mark.parametrize("saved", ["linear1", "self_attn", "layers.0"])
def test_copies_inside_encoder_layers_are_used_in_evaluation(saved):
    model = Encoder(nested=False)
    attach(model, LoRA(r=2, target_modules=["linear2"], exclude_modules=["layers.0"], modules_to_save=[saved]))
    perturb(model, std=0.5)
    x, _ = padded()
    with torch.no_grad():
        trained, evaluated = model.train()(x), model.eval()(x)
        with disabled(model):
            assert gap(model(x), trained) > 1e-2
    assert gap(evaluated, trained) <= 1e-5
