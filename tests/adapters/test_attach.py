import copy
import pickle

import pytest
import torch
from torch import nn

from lora_lightning.adapters import (
    Role,
    adapter_state_dict,
    attach,
    attached_methods,
    detach,
    disabled,
    is_attached,
    iter_acting,
    iter_adapters,
    iter_hosts,
    iter_roles,
    merge,
    require_calls,
)
from lora_lightning.errors import AdapterNotCalled, ConfigError, TargetError
from lora_lightning.methods import DoRA, LoRA
from tests.adapters.toys import Bias, BiasDelta, Model, Scale, fingerprint, ids
from tests.models import gap, perturb

# What a report says, and who is who


def test_report_counts():
    model = Model()
    num_base = sum(parameter.numel() for parameter in model.parameters())
    report = attach(model, LoRA(r=2, target_modules=["query"], modules_to_save=["out"]))
    assert report.hosts == ("layer.0.query", "layer.1.query", "head.out")
    assert report.num_trainable == 2 * (2 * 8 + 8 * 2) + 27
    assert report.num_total == num_base + report.num_trainable
    assert report.trainable_share == pytest.approx(report.num_trainable / report.num_total)
    assert report.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.num_total == sum(p.numel() for p in model.parameters())


def test_a_host_of_two_methods_is_reported_once():
    report = attach(Model(), [LoRA(r=2, target_modules=["query"]), Bias(target_modules=["query", "dense"])])
    assert report.hosts == ("layer.0.query", "layer.1.query", "head.dense")


def test_who_is_attached():
    model, method = Model(), LoRA(r=2, target_modules=["query"])
    assert not is_attached(model)
    assert attached_methods(model) == ()
    attach(model, method)
    assert is_attached(model)
    assert attached_methods(model) == (method,)
    assert [path for path, _ in iter_hosts(model)] == ["layer.0.query", "layer.1.query"]
    detach(model)
    assert attached_methods(model) == ()


def test_roles():
    model = Model()
    attach(model, [DoRA(r=2, target_modules=["query"], modules_to_save=["out"]), Bias(target_modules=["dense"])])
    roles = {name: role for name, _, role in iter_roles(model) if not name.startswith("layer.1")}
    assert roles == {
        "layer.0.query.lora_A": Role.A,
        "layer.0.query.lora_B": Role.B,
        "layer.0.query.magnitude": Role.MAGNITUDE,
        "head.dense.delta": Role.BIAS,
        "head.out.weight": Role.HEAD,
        "head.out.bias": Role.HEAD,
    }
    embedded = Model()
    attach(embedded, LoRA(r=2, target_modules=["embed"]))
    assert {role for _, _, role in iter_roles(embedded)} == {Role.EMBEDDING}


def test_the_whole_model_may_be_the_host():
    model = nn.Linear(8, 4)
    x, base = torch.randn(3, 8), None
    base = model(x)
    assert attach(model, LoRA(r=2)).hosts == ("",)
    assert list(adapter_state_dict(model)) == ["lora_A", "lora_B"]
    assert torch.equal(model(x), base)
    expected = perturb(model)(x)
    clone = pickle.loads(pickle.dumps(model))
    assert torch.equal(clone(x), expected)
    merge(model)
    assert type(model) is nn.Linear
    assert gap(model(x), expected) <= 1e-5
    detach(clone)
    assert torch.equal(clone(x), base)


def test_detaching_from_the_whole_what_was_attached_to_a_part():
    model = Model()
    before = fingerprint(model)
    attach(model.layer[1], LoRA(r=2, target_modules=["query"]))
    assert is_attached(model)
    assert model.embed.weight.requires_grad
    with pytest.raises(TargetError, match="already has adapters"):
        attach(model, LoRA(r=2, target_modules=["value"]))
    detach(model)
    assert fingerprint(model) == before


# What attach refuses; the model is then as before

REFUSED = {
    "no method": (lambda: [], TargetError, "takes a method"),
    "a class": (lambda: LoRA, TargetError, r"got class \(write LoRA\(\)"),
    "a dict": (lambda: [{"r": 8}], TargetError, r"list of methods; got list \[\{'r': 8\}\]"),
    "nothing matches": (lambda: LoRA(target_modules=["qery"]), TargetError, "Nearest names: query"),
    "r too large": (lambda: LoRA(r=9, target_modules=["query"]), ConfigError, "r is at most 8"),
    "two forwards": (
        lambda: [LoRA(r=2, target_modules=["query"]), DoRA(r=2, target_modules=["value", "0.query"])],
        TargetError,
        "lora and dora both want to compute the forward of 'layer.0.query'",
    ),
    "twice the same": (
        lambda: [LoRA(r=2, target_modules=["query"]), LoRA(r=4, target_modules=["query"])],
        TargetError,
        "given twice",
    ),
    "twice the same hook": (
        lambda: [Bias(target_modules=["query"]), Bias(target_modules=["query"])],
        TargetError,
        "given twice",
    ),
    "target inside a copy": (
        lambda: LoRA(r=2, target_modules=["layer.0.query"], modules_to_save=["layer.0"]),
        TargetError,
        "'layer.0.query' is both a target and in modules_to_save",
    ),
    "hook inside another's copy": (
        lambda: [LoRA(r=2, target_modules=["query"], modules_to_save=["head"]), Bias(target_modules=["out"])],
        TargetError,
        "'head.out' is both a target and in modules_to_save",
    ),
    "hook inside a copy, placed blindly": (
        lambda: InTheHead(modules_to_save=["head"]),
        TargetError,
        "'head.out' lies inside a module that is trained as a full copy",
    ),
    "unknown copy": (
        lambda: LoRA(r=2, target_modules=["query"], modules_to_save=["haed"]),
        TargetError,
        "modules_to_save: no module is called 'haed'. Nearest names: head",
    ),
}


class InTheHead(Bias):
    """A bias delta on a module that it does not look for."""

    def adapters(self, view):
        yield "head.out", BiasDelta(3)


class OnTheHead(Bias):
    """A bias delta on what the whole head returns."""

    def adapters(self, view):
        yield "head", BiasDelta(3)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_model_alone(name):
    method, kind, message = REFUSED[name]
    model = Model()
    model.embed.requires_grad_(False)
    before, output = fingerprint(model), model(ids())
    with pytest.raises(kind, match=message):
        attach(model, method())
    assert fingerprint(model) == before
    assert torch.equal(model(ids()), output)
    assert not is_attached(model)


def test_a_second_attach_is_refused():
    model = Model()
    attach(model, LoRA(r=2, target_modules=["query"]))
    before = fingerprint(model)
    with pytest.raises(TargetError, match=r"already has adapters \(LoRA\); detach or merge"):
        attach(model, DoRA(r=2, target_modules=["value"]))
    assert fingerprint(model) == before
    detach(model)
    attach(model, DoRA(r=2, target_modules=["value"]))


def test_a_forward_on_the_instance_is_refused():
    model = Model()
    model.layer[0].query.forward = lambda x: x
    with pytest.raises(TargetError, match=r"forward of 'layer.0.query' was replaced on the instance"):
        attach(model, LoRA(r=2, target_modules=["query"]))
    attach(model, Bias(target_modules=["query"]))  # a hook is called all the same
    perturb(model)
    with disabled(model):
        base = model(ids())
    assert gap(model(ids()), base) > 1e-3


def test_a_compiled_model_is_refused():
    model = torch.compile(Model(), backend="eager")
    with pytest.raises(TargetError, match="compiled already"):
        attach(model, LoRA(r=2))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("action", [detach, merge])
def test_actions_on_a_compiled_model(action):
    model = Model()
    compiled_base = torch.compile(model, backend="eager")  # leaves a mark of its own on the model
    before = fingerprint(model)
    del compiled_base
    attach(model, LoRA(r=2, target_modules=["query"]))
    compiled = torch.compile(model, backend="eager")
    compiled(ids())
    assert is_attached(compiled)
    assert attached_methods(compiled) == attached_methods(model)
    assert adapter_state_dict(compiled).keys() == adapter_state_dict(model).keys()
    action(compiled)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("action", "name"), [(lambda m: attach(m, LoRA()), "attach"), (detach, "detach"), (merge, "merge")]
)
def test_sharded_models_are_refused(action, name):
    model = Model()
    if name != "attach":
        attach(model, LoRA(r=2, target_modules=["query"]))
    model.embed.weight.device_mesh = object()  # what a DTensor has
    with pytest.raises(TargetError, match=rf"^{name} needs whole parameters.*sharded"):
        action(model)


# Disabling


def test_disabled_nests_and_survives_exceptions():
    model = Model()
    base = model(ids())
    attach(model, [LoRA(r=2, target_modules=["query"], modules_to_save=["out"]), Bias(target_modules=["dense"])])
    adapted = perturb(model)(ids())
    assert gap(adapted, base) > 1e-2
    with disabled(model):
        with disabled(model):
            assert torch.equal(model(ids()), base)
        assert torch.equal(model(ids()), base)
    assert torch.equal(model(ids()), adapted)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(model(ids()), adapted)


def test_disabling_a_part():
    model = Model()
    attach(model, LoRA(r=2, target_modules=["query"]))
    perturb(model)
    with disabled(model.layer[0]):
        assert [path for path, _, _ in iter_acting(model)] == ["layer.1.query"]
    assert [path for path, _, _ in iter_acting(model)] == ["layer.0.query", "layer.1.query"]


# Adapters that are never called


class Forgetful(Model):
    def forward(self, ids):
        return self.head(self.layer[0](self.embed(ids)))


def test_require_calls_names_the_idle_host():
    model = Forgetful()
    attach(model, LoRA(r=2, target_modules=["query"]))
    message = r"1 of 2 adapters were not called.*'layer.1.query'.*exclude_modules"
    with pytest.raises(AdapterNotCalled, match=message), require_calls(model):
        model(ids())
    detach(model)
    attach(model, LoRA(r=2, target_modules=["query"], exclude_modules=["layer.1"]))
    with require_calls(model):
        model(ids())
    assert not any(adapter._forward_pre_hooks for _, _, adapter in iter_adapters(model))


def test_require_calls_lets_other_errors_through():
    model = Forgetful()
    attach(model, LoRA(r=2, target_modules=["query"]))
    with pytest.raises(KeyError), require_calls(model):
        raise KeyError
    assert not any(adapter._forward_pre_hooks for _, _, adapter in iter_adapters(model))


# Modes, copies, hooks


@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_their_hosts_mode(training):
    model = Model().train(training)
    model.layer[1].train(not training)
    attach(model, LoRA(r=2, target_modules=["query"]))
    assert [adapter.training for _, _, adapter in iter_adapters(model)] == [training, not training]


def test_hooks_of_others_survive():
    model = Model()
    calls = []
    handles = [
        model.layer[0].query.register_forward_hook(lambda *_: calls.append("after")),
        model.layer[0].query.register_forward_pre_hook(lambda *_: calls.append("before")),
    ]
    attach(
        model, [LoRA(r=2, target_modules=["query"]), Bias(target_modules=["query"]), Scale(target_modules=["query"])]
    )
    model(ids())
    assert calls == ["before", "after"]
    clone = copy.deepcopy(model)
    for each in (model, clone):
        detach(each)
        each(ids())
    assert calls == ["before", "after"] * 3
    for handle in handles:
        handle.remove()
    model(ids())
    assert calls == ["before", "after"] * 3


def test_one_adapted_class_per_host_class():
    first, second = Model(), Model()
    for model in (first, second):
        attach(model, LoRA(r=2, target_modules=["query", "embed"]))
    assert type(first.layer[0].query) is type(second.layer[1].query)
    assert type(first.layer[0].query) is not type(first.embed)
    assert isinstance(first.embed, nn.Embedding)
    assert repr(first.layer[0].query).startswith("AdaptedLinear(")
    assert "r=2, scaling=8, dropout=0" in repr(first)


# Hosts that run their children in turn


@pytest.mark.parametrize(
    "method", [LoRA(r=2, target_modules=["query"], modules_to_save=["head"]), OnTheHead()], ids=["copy", "hook"]
)
def test_a_sequential_host(method):
    model = Model()
    base = model(ids())
    attach(model, method)
    assert torch.equal(model(ids()), base)
    assert gap(perturb(model)(ids()), base) > 1e-2
    with disabled(model):
        assert torch.equal(model(ids()), base)
