"""4-bit bases, bfloat16, autocast."""

import copy

import pytest
import torch
from torch import Tensor

from lora_lightning.adapters import adapter_state_dict, iter_roles, load_adapter_state_dict
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.errors import NotMergeable
from tests import models
from tests.contract.examples import Example
from tests.contract.steps import adapted, dequantized, has_no_gradient, largest_gap, quantize, step


def test_four_bit_base(base, method, example):
    quantize(base)
    dense = dequantized(base)
    expected = models.logits(base)
    attach(base, method)
    assert (models.gap(models.logits(base), expected) <= 1e-5) != example.changes_start
    attach(dense, method)
    load_adapter_state_dict(dense, adapter_state_dict(models.perturb(base)))
    assert models.gap(models.logits(base), expected) > 1e-3
    assert models.gap(models.logits(base), models.logits(dense)) <= 1e-5
    actual, reference = step(base), step(dense)
    assert largest_gap(actual, reference, example) <= 1e-4
    output = models.logits(base)
    if example.merges_quantized:
        merge(base)
        assert models.gap(models.logits(base), output) <= 1e-5
        return
    with pytest.raises(NotMergeable, match="quantized" if example.is_mergeable else None):
        merge(base)
    assert torch.equal(models.logits(base), output)


def test_four_bit_base_in_evaluation_and_back(base, method, example):
    adapted(quantize(base), method).train()
    expected, grads = models.logits(base), step(base)
    with torch.no_grad():
        assert models.gap(models.logits(base.eval()), expected) <= 1e-5
    after = step(base.train())
    assert largest_gap(after, grads, example) <= 1e-6


def test_bfloat16_base_under_float32_adapters(base, method, example):
    base.bfloat16()
    before = models.logits(base)
    attach(base, method)
    assert {parameter.dtype for _, parameter, _ in iter_roles(base)} == {torch.float32}
    after = models.logits(base)
    assert after.dtype is torch.bfloat16
    assert (models.gap(after, before) <= 2e-2) != example.changes_start
    wide = copy.deepcopy(models.perturb(base, std=example.spread)).float()
    assert models.gap(models.logits(base), before) > 0.1
    assert models.gap(models.logits(base), models.logits(wide)) <= 5e-2
    assert_same_directions(step(base), step(wide), example)


def assert_same_directions(actual: dict[str, Tensor], reference: dict[str, Tensor], example: Example) -> None:
    """Compare float32 gradients that were computed in bfloat16 with exact ones."""
    for name, grad in actual.items():
        assert grad.dtype is torch.float32
        if has_no_gradient(name, example):
            continue
        assert torch.cosine_similarity(grad.flatten(), reference[name].flatten(), dim=0) > 0.97, name


def test_autocast(base, method, example):
    adapted(base, method)
    reference, expected = step(base), models.logits(base)
    base.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = models.logits(base)
        loss = output.float().square().mean()
    loss.backward()
    assert output.dtype is torch.bfloat16
    assert 1e-5 < models.gap(output, expected) <= 5e-2
    grads = {name: parameter.grad for name, parameter, _ in iter_roles(base) if parameter.requires_grad}
    assert_same_directions(grads, reference, example)
