"""Adapters of several names on one model: each acts as it would alone, and none disturbs another."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import (
    acting_names,
    active,
    adapter_names,
    attached_methods,
    detach,
    disabled,
    iter_adapters,
    only,
    report_of,
    set_active,
)
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import AdaLoRA, DoRA, LoRA, PromptTuning
from lora_lightning.methods.adalora import AdaLoRAAdapter
from tests.adapters.names.several import METHODS, alone, base, with_names
from tests.models import gap, logits


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    return with_names()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    return logits(model)


@pytest.mark.parametrize("name", METHODS)
def test_each_name_acts_as_it_would_alone(shared, name):
    with active(shared, name):
        found = answer(shared)
    assert gap(found, answer(alone(shared, name))) <= 1e-10
    assert gap(found, answer(base())) >= 1e-3
    for other in set(METHODS) - {name}:
        with active(shared, other):
            assert gap(answer(shared), found) >= 1e-3


def test_the_first_name_acts_until_another_is_chosen(shared):
    model = copy.deepcopy(shared)
    assert acting_names(model) == ("de",)
    assert torch.equal(answer(model), answer(alone(model, "de")))
    set_active(model, "nl")
    assert acting_names(model) == ("nl",)
    assert torch.equal(answer(model), answer(alone(model, "nl")))
    set_active(model, None)
    assert acting_names(model) == ()
    assert torch.equal(answer(model), answer(base()))


def test_none_gives_the_base(shared):
    bare = answer(base())
    with active(shared, None):
        assert torch.equal(answer(shared), bare)
    with disabled(shared):
        assert torch.equal(answer(shared), bare)
    assert not torch.equal(answer(shared), bare)


def test_updates_of_several_names_add_up():
    """Of one linear layer, where the sum can be written down."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    model = nn.Sequential(layer)
    for name, r in (("de", 2), ("fr", 3)):
        attach(model, LoRA(r=r, target_modules=["0"]), name=name)
    weight = layer.weight.detach().clone()
    for _, _, adapter in iter_adapters(model):
        nn.init.normal_(adapter.lora_B)
        weight += adapter.scaling * adapter.lora_B.detach() @ adapter.lora_A.detach()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x @ weight.t() + layer.bias
    with active(model, ["de", "fr"]):
        assert gap(model(x), expected) <= 1e-12
    with active(model, "de"):
        assert gap(model(x), expected) >= 1e-2


def test_what_does_not_add_up_is_refused(shared):
    with pytest.raises(ConfigError, match="'nl' has a magnitude"), active(shared, ["fr", "nl"]):
        pass
    model = base("llama")
    for name in ("long", "short"):
        attach(model, PromptTuning(num_virtual_tokens=len(name)), name=name)
    with pytest.raises(ConfigError, match="'long' uses PromptTuning, of which one acts at a time"):
        set_active(model, ["long", "short"])
    assert acting_names(model) == ("long",)


def test_a_misspelt_name_names_the_nearest(shared):
    with pytest.raises(ConfigError, match="no adapter named 'dee'; did you mean `de`"), active(shared, "dee"):
        pass
    with pytest.raises(ConfigError, match="no adapter named 'zzz'; its adapters are de, fr, it, nl, pt"):
        set_active(shared, "zzz")
    with pytest.raises(ConfigError, match="it has none"):
        set_active(base(), "de")
    with pytest.raises(ConfigError, match="got 3"), active(shared, 3):
        pass


@pytest.mark.parametrize("name", ["a.b", "", "a/b", "a b", 3])
def test_names_that_keys_cannot_hold_are_refused(name):
    model = base()
    with pytest.raises(ConfigError, match="letters, digits, - and _"):
        attach(model, LoRA(r=2), name=name)
    assert adapter_names(model) == ()


def test_a_taken_or_missing_name_is_refused(shared):
    with pytest.raises(TargetError, match="already has an adapter named 'de'"):
        attach(shared, LoRA(r=2), name="de")
    with pytest.raises(TargetError, match=r"give these a name \(name=...\)"):
        attach(shared, LoRA(r=2))
    assert adapter_names(shared) == tuple(METHODS)


def test_names_may_be_those_of_module_methods():
    model = nn.Sequential(nn.Linear(4, 4))
    names = ("keys", "pop", "train", "lora", "default", "modules_to_save")
    for name in names:
        attach(model, LoRA(r=1), name=name)
    assert adapter_names(model) == names
    assert adapter_names(pickle.loads(pickle.dumps(model))) == names
    for name in names:
        with active(model, name):
            assert acting_names(model) == (name,)


def test_detaching_one_leaves_the_others(shared):
    model = copy.deepcopy(shared)
    detach(model, "de")
    assert adapter_names(model) == ("fr", "it", "nl", "pt")
    assert acting_names(model) == ("fr",)
    for name in adapter_names(model):
        with active(model, name):
            assert torch.equal(answer(model), answer(alone(shared, name)))
    for name in adapter_names(model):
        detach(model, name)
    assert not any(RESERVED in path for path, _ in model.named_modules())
    bare = base()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in bare.named_parameters()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in bare.parameters()]
    assert [type(module) for module in model.modules()] == [type(module) for module in bare.modules()]
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


def test_a_name_can_be_attached_again(shared):
    model = copy.deepcopy(shared)
    detach(model, "fr")
    attach(model, LoRA(r=1), name="fr")
    assert adapter_names(model) == ("de", "it", "nl", "pt", "fr")
    assert acting_names(model) == ("de",)
    assert torch.equal(answer(model), answer(shared))


def test_copies_are_made_of_the_bare_module():
    """Of a head that another adapter hangs in already, and that is itself copied."""
    model = base()
    attach(model, LoRA(r=2, target_modules=["query", "classifier"], modules_to_save=None), name="inside")
    attach(model, LoRA(r=2, target_modules=["query"], modules_to_save=["classifier"]), name="copy")
    attach(model, LoRA(r=2, target_modules=["query"], modules_to_save=["classifier"]), name="again")
    copies = [adapter.module for _, _, adapter in iter_adapters(model) if adapter.method is None]
    assert [type(one) for one in copies] == [nn.Linear, nn.Linear]
    assert not any(RESERVED in path for one in copies for path, _ in one.named_modules())


def test_the_report_is_of_the_new_adapter_alone(shared):
    model = base()
    for name, method in METHODS.items():
        report, alone_report = attach(model, method, name=name), attach(base(), method)
        assert (report.num_trainable, report.hosts) == (alone_report.num_trainable, alone_report.hosts)
    counts = [report_of(model, name).num_trainable for name in METHODS]
    assert report_of(model).num_trainable == sum(counts)
    assert len(set(counts)) == len(counts)


def test_methods_with_equal_settings_share_nothing():
    """AdaLoRA's budget is one name's alone, though both have the same settings."""
    method = AdaLoRA(target_r=1, init_r=2, t_init=1, t_final=1, delta_t=1, target_modules=["query"])
    model = base()
    for name in ("de", "fr"):
        attach(model, method, name=name)
    with torch.no_grad():
        for adapter in triplets(model):
            adapter.lora_E.fill_(1)
    for name in ("de", "fr"):
        with active(model, name):
            logits(model).square().sum().backward()
    with only(model, "de"):
        for step in range(8):
            method.before_step(model, step, 8)
            method.after_step(model, step, 8)
    assert num_kept(model, "de") == 2  # one for each of two hosts
    assert num_kept(model, "fr") == 4
    with pytest.raises(ConfigError, match="under the names de, fr"):
        method.after_step(model, 0, 8)


def triplets(model: nn.Module, name: str | None = None) -> list[AdaLoRAAdapter]:
    return [adapter for _, _, adapter in iter_adapters(model, name) if isinstance(adapter, AdaLoRAAdapter)]


def num_kept(model: nn.Module, name: str) -> int:
    return sum(int((adapter.lora_E != 0).sum()) for adapter in triplets(model, name))


def test_methods_are_asked_by_name(shared):
    assert attached_methods(shared, "nl") == (METHODS["nl"],)
    assert attached_methods(shared, "it") == tuple(METHODS["it"])
    assert len(attached_methods(shared)) == 6


def test_one_unnamed_adapter_keeps_its_keys():
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, DoRA(r=1))
    assert adapter_names(model) == ("default",)
    assert f"0.{RESERVED}.dora.lora_A" in dict(model.named_parameters())


def test_a_base_that_trains_again_stays_frozen(shared):
    model = copy.deepcopy(shared)
    attach(model, LoRA(r=1), name="new")
    trains = {name.split(RESERVED)[-1] != name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {True}


def test_norms_stay_frozen_through_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    attach(model, LoRA(r=1, target_modules=["0"]), name="de")
    attach(model, LoRA(r=1, target_modules=["0"], modules_to_save=["1"]), name="fr")
    before = model[1].running_mean.clone()
    model.train()
    model(torch.randn(8, 4))
    assert torch.equal(model[1].running_mean, before)
    with active(model, "fr"):
        model(torch.randn(8, 4))
    assert torch.equal(model[1].running_mean, before)
    (copied,) = (adapter.module for _, _, adapter in iter_adapters(model, "fr") if adapter.method is None)
    assert not torch.equal(copied.running_mean, before)
    detach(model, "fr")
    model(torch.randn(8, 4))
    assert torch.equal(model[1].running_mean, before)
    detach(model)
    model(torch.randn(8, 4))
    assert not torch.equal(model[1].running_mean, before)
