"""Start, gradients, state, merge, and what of the base stays as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_lightning.adapters import adapter_state_dict, detach, disabled, iter_roles, load_adapter_state_dict
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.errors import CheckpointError, NotMergeable
from lora_lightning.methods import DoRA, LoRA
from tests import models
from tests.contract.examples import EXAMPLES, concrete_methods
from tests.contract.steps import adapted, has_no_gradient, step


def test_every_method_has_an_example():
    assert concrete_methods() >= {LoRA, DoRA}
    without = {cls.__name__ for cls in concrete_methods()} - {cls.__name__ for cls in EXAMPLES}
    assert not without, f"add settings of {without} to EXAMPLES, so that they are held to the contract"


def test_first_forward_equals_the_base(base, method, example):
    before = models.logits(base)
    attach(base, method)
    after = models.logits(base)
    assert after.shape == before.shape
    if example.is_exact:
        assert torch.equal(after, before)
    assert (models.gap(after, before) <= 1e-6) != example.changes_start
    assert models.gap(models.logits(models.perturb(base)), before) > 1e-3


def test_adapters_alone_get_gradients(base, method, example):
    names = {name for name, _ in base.named_parameters()}
    adapted(base, method)
    grads = step(base)
    assert grads
    for name, grad in grads.items():
        by_nature = has_no_gradient(name, example)
        assert grad is not None
        assert (grad.abs().max() <= 1e-6) if by_nature else (grad.abs().max() > 1e-7), name
    for name, parameter in base.named_parameters():
        assert (name in names) == (parameter.grad is None)
        assert (name in names) != parameter.requires_grad


def test_state_round_trip(architecture, method):
    first = adapted(models.build(architecture), method)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(first).items()}
    torch.manual_seed(99)
    second = models.build(architecture)
    attach(second, method)
    assert models.gap(models.logits(second), models.logits(first)) > 1e-3
    load_adapter_state_dict(second, state)
    assert torch.equal(models.logits(second), models.logits(first))
    assert adapter_state_dict(second).keys() == state.keys()
    with pytest.raises(CheckpointError):
        load_adapter_state_dict(second, dict(list(state.items())[1:]))


def test_merged_equals_adapted(base, method, example):
    keys, kinds = base.state_dict().keys(), {path: type(module) for path, module in base.named_modules()}
    with torch.no_grad():
        before = models.logits(base)
        expected = models.logits(adapted(base, method))
        if not example.is_mergeable:
            with pytest.raises(NotMergeable):
                merge(base)
            assert torch.equal(models.logits(base), expected)
            return
        merge(base)
        assert models.gap(models.logits(base), expected) <= 1e-5
        assert models.gap(models.logits(base), before) > 1e-3
    assert base.state_dict().keys() == keys
    assert {path: type(module) for path, module in base.named_modules()} == kinds


def test_disabled_gives_the_base(base, method):
    before = models.logits(base)
    adapted(base, method)
    with disabled(base):
        assert torch.equal(models.logits(base), before)
    assert models.gap(models.logits(base), before) > 1e-3


def snapshot(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Return what `attach` may touch of each module."""
    return {
        path: (
            type(module),
            sorted(module.__dict__.keys()),
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            dict(module._forward_hooks_with_kwargs),
            dict(module._forward_pre_hooks_with_kwargs),
            [(name, id(parameter), parameter.requires_grad) for name, parameter in module.named_parameters()],
            [(name, id(tensor)) for name, tensor in module.named_buffers()],
        )
        for path, module in model.named_modules()
    }


def test_detach_restores_everything(base, method):
    next(base.parameters()).requires_grad_(False)
    before, keys, output = snapshot(base), list(base.state_dict()), models.logits(base)
    adapted(base, method)
    assert snapshot(base) != before
    detach(base)
    assert snapshot(base) == before
    assert list(base.state_dict()) == keys
    assert torch.equal(models.logits(base), output)


def test_base_names_are_kept(base, method):
    before = base.state_dict()
    adapted(base, method)
    after = {name: tensor for name, tensor in base.state_dict().items() if RESERVED not in name.split(".")}
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies_are_independent(base, method, clone):
    adapted(base, method)
    expected = models.logits(base).detach()
    other = clone(base)
    assert torch.equal(models.logits(other), expected)
    models.perturb(other, seed=3)
    assert models.gap(models.logits(other), expected) > 1e-3
    assert torch.equal(models.logits(base), expected)
    assert step(other).keys() == step(base).keys()
    detach(other)
    assert not any(RESERVED in name for name in other.state_dict())


def test_meta_device(base, method):
    hollow = copy.deepcopy(base).to("meta")
    hollow.tie_weights()  # moving them to the meta device unties them
    hollow.config.pad_token_id = None  # else GPT-2 looks for padding in the ids, which have no values
    report = attach(hollow, method)
    assert all(parameter.is_meta for _, parameter, _ in iter_roles(hollow))
    ids = {name: tensor.to("meta") for name, tensor in models.inputs(base).items()}
    assert models.logits(hollow, {"input_ids": ids["input_ids"]}).is_meta
    base_buffers = dict(base.named_buffers())
    assert attach(base, method) == report
    models.perturb(base)
    hollow.to_empty(device="cpu")
    hollow.load_state_dict(base.state_dict())
    for name, buffer in hollow.named_buffers():
        if name in base_buffers:
            buffer.copy_(base_buffers[name])
    assert models.gap(models.logits(hollow), models.logits(base)) <= 1e-6
