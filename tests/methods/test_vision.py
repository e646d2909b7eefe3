"""The linear methods on a vision transformer."""

import pytest
import torch
import transformers
from torch import nn

from lora_lightning.adapters import adapter_state_dict, disabled, load_adapter_state_dict
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.methods import AdaLoRA, BitFit, DeltaLoRA, DoRA, LoRA, LoRAFA, VeRA
from tests import models

METHODS = [
    LoRA(r=4, target_modules="all-linear"),
    LoRA(r=4),
    LoRA(r=4, target_modules=["projection"]),  # the convolution that makes patches
    DoRA(r=4, target_modules="all-linear"),
    AdaLoRA(target_r=3, init_r=4, target_modules="all-linear"),
    VeRA(r=16, d_initial=0.5, target_modules="all-linear"),
    LoRAFA(r=4, target_modules="all-linear"),
    DeltaLoRA(r=4, start_step=0, target_modules="all-linear"),
    BitFit(),
]


def build() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(pixel_values=pixels).logits


@pytest.mark.filterwarnings("ignore:BitFit leaves out biases.*Conv2d")  # of the patches
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_method_on_a_vision_transformer(method):
    model = build()
    before = logits(model)
    report = attach(model, method)
    assert not any("classifier" in host for host in report.hosts)
    assert models.gap(logits(model), before) <= 1e-6
    models.perturb(model)
    adapted = logits(model)
    assert models.gap(adapted, before) > 1e-3
    with disabled(model):
        assert torch.equal(logits(model), before)
    adapted.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    merge(model)
    assert models.gap(logits(model), adapted) <= 1e-5
    torch.manual_seed(99)
    other = build()
    attach(other, method)
    load_adapter_state_dict(other, state)
    assert torch.equal(logits(other), adapted)
