"""Every method that needs no tokens, on a vision transformer."""

import pytest
import torch

from lora_lightning.adapters import adapter_state_dict, disabled, load_adapter_state_dict
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.errors import NotMergeable
from lora_lightning.methods import IA3, AdaLoRA, BitFit, BottleneckAdapter, DeltaLoRA, DoRA, LoRA, LoRAFA, VeRA
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
    IA3(),
    BottleneckAdapter(width=4),
]


@pytest.mark.filterwarnings("ignore:BitFit leaves out biases.*Conv2d")  # of the patches
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_method_on_a_vision_transformer(method):
    model = models.build("vit")
    before = models.logits(model)
    report = attach(model, method)
    assert not any("classifier" in host for host in report.hosts)
    assert models.gap(models.logits(model), before) <= 1e-6
    models.perturb(model)
    adapted = models.logits(model)
    assert models.gap(adapted, before) > 1e-3
    with disabled(model):
        assert torch.equal(models.logits(model), before)
    adapted.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    if isinstance(method, BottleneckAdapter):
        with pytest.raises(NotMergeable):
            merge(model)
    else:
        merge(model)
    assert models.gap(models.logits(model), adapted) <= 1e-5
    torch.manual_seed(99)
    other = models.build("vit")
    attach(other, method)
    load_adapter_state_dict(other, state)
    assert torch.equal(models.logits(other), adapted)
