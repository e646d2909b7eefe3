"""Merging one of two tied weights, and merging beside them."""

import pytest
import torch

from lora_lightning.adapters import (
    attach,
    merge,
)
from lora_lightning.methods import DoRA, LoRA
from tests.adapters.toys import TiedModel, ids
from tests.models import gap, perturb


@pytest.mark.parametrize("target", ["out", "embed.0"])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_merging_one_half_of_tied_weights(target, kind):
    model = TiedModel()
    shared = model.out.weight.detach().clone()
    attach(model, kind(r=2, target_modules=[target]))
    assert model.out.weight is model.embed[0].weight
    expected = perturb(model)(ids())
    merge(model)
    assert gap(model(ids()), expected) <= 1e-5
    changed, other = (model.out, model.embed[0]) if target == "out" else (model.embed[0], model.out)
    assert torch.equal(other.weight, shared)
    assert gap(changed.weight, shared) > 1e-2
    assert changed.weight.requires_grad
    assert other.weight.requires_grad


def test_merging_a_copy_that_holds_one_half_of_tied_weights():
    model = TiedModel()
    shared = model.out.weight.detach().clone()
    attach(model, LoRA(r=2, target_modules=["body"], modules_to_save=["embed"]))
    expected = perturb(model)(ids())
    merge(model)
    assert gap(model(ids()), expected) <= 1e-5
    assert torch.equal(model.out.weight, shared)


def test_merging_elsewhere_keeps_weights_tied():
    model = TiedModel()
    attach(model, LoRA(r=2, target_modules=["body"]))
    merge(model)
    assert model.out.weight is model.embed[0].weight
