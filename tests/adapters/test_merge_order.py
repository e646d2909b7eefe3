"""Adapters around a host's forward merge after those that compute it, whichever was attached first."""

import pytest
import torch

from lora_lightning.backbones.attach import attach, merge
from lora_lightning.methods import IA3, BitFit, LoRA
from tests import models


@pytest.mark.parametrize("is_first", [True, False])
def test_methods_on_one_host_merge_in_any_order(is_first):
    model = models.build("bert")
    methods = [BitFit(), LoRA(r=2, target_modules=["key", "value"]), IA3()]
    attach(model, methods if is_first else methods[::-1])
    models.perturb(model)
    with torch.no_grad():
        expected = models.logits(model)
        merge(model)
        assert models.gap(models.logits(model), expected) <= 1e-5
        assert models.gap(models.logits(models.build("bert")), expected) > 1e-2
