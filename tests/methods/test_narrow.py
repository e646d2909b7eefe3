"""Layers narrower than the rank, and targets inside modules that are trained whole."""

import warnings

import peft
import pytest
import torch
from torch import nn

from lora_lightning import attach, export_peft, load_peft, merge
from lora_lightning.adapters import adapter_state_dict, iter_adapters, load_adapter_state_dict
from lora_lightning.checkpoint.starting import read_starting_adapter
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import IA3, AdaLoRA, DeltaLoRA, DoRA, LoRA, LoRADrop, LoRAFA
from tests import models
from tests.models import gap, perturb

# PEFT's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Gated(nn.Module):
    """Three layers of 12, one gate of a single output, one of two inputs."""

    def __init__(self):
        super().__init__()
        self.wide, self.gate, self.small, self.out = (
            nn.Linear(12, 12),
            nn.Linear(12, 1),
            nn.Linear(2, 12),
            nn.Linear(12, 12),
        )

    def forward(self, x):
        return self.out(self.wide(x) * self.gate(x).sigmoid() + self.small(x[..., :2]))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def gated():
    torch.manual_seed(0)
    return Gated()


@pytest.mark.parametrize("scaling", ["standard", "rslora", "alpha"])
@pytest.mark.parametrize("method", [LoRA, DoRA, LoRAFA, DeltaLoRA, LoRADrop])
def test_all_linear_caps_the_rank_and_keeps_the_factor(method, scaling):
    model = gated()
    before = model(X).detach()
    with pytest.warns(UserWarning, match=r"2 of 4 layers are narrower than r=4, such as 'small' \(12 x 2\)") as told:
        attach(model, method(r=4, scaling=scaling, target_modules="all-linear"))
    assert len(told) == 1
    adapters = {path: adapter for path, _, adapter in iter_adapters(model)}
    assert {path: one.r for path, one in adapters.items()} == {"wide": 4, "gate": 1, "small": 2, "out": 4}
    assert len({round(one.scaling, 9) for one in adapters.values()}) == 1
    assert gap(model(X), before) < 1e-6
    perturb(model)
    want = model(X).detach()
    again = gated()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(again, method(r=4, scaling=scaling, target_modules="all-linear"))
    load_adapter_state_dict(again, adapter_state_dict(model))
    assert gap(again(X), want) < 1e-6
    merge(again)
    assert gap(again(X), want) < 1e-5
    assert gap(before, want) > 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "eva"])
def test_starts_on_narrow_layers(init):
    model = gated()
    before = model(X).detach()
    with pytest.warns(UserWarning, match="2 of 4 layers"):
        attach(model, LoRA(r=4, init=init, target_modules="all-linear"))
    assert gap(model(X), before) < 1e-5


def test_adalora_caps_its_start():
    model = gated()
    with pytest.warns(UserWarning, match="2 of 4 layers are narrower than init_r=6, such as 'gate'"):
        attach(model, AdaLoRA(target_r=4, target_modules="all-linear"))
    adapters = {path: adapter for path, _, adapter in iter_adapters(model)}
    assert {path: one.r for path, one in adapters.items()} == {"wide": 6, "gate": 1, "small": 2, "out": 6}
    assert len({one.scaling for one in adapters.values()}) == 1
    method = adapters["wide"].method
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for step in range(20):
        (model(X).square().mean() + method.extra_loss(model)).backward()
        method.before_step(model, step, 20)
        optimizer.step()
        method.after_step(model, step, 20)
    kept = sum(int((one.lora_E != 0).sum()) for one in adapters.values())
    assert 0 < kept <= 4 * 4


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "llama"])
def test_all_linear_on_transformers_models(name):
    model = models.build(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attach(model, LoRA(r=24, target_modules="all-linear"))
    assert [str(one.message).partition(":")[0] for one in told] == ["all-linear"]
    want = models.logits(perturb(model)).detach()
    merge(model)
    assert gap(models.logits(model), want) < 1e-4


@pytest.mark.parametrize("targets", [["gate"], ["gate", "wide"], ".*gate"])
def test_a_named_layer_is_still_refused(targets):
    with pytest.raises(ConfigError, match="r=4 is larger than 'gate' allows"):
        attach(gated(), LoRA(r=4, target_modules=targets))


@pytest.mark.parametrize("method", [LoRA(r=13), DoRA(r=13), AdaLoRA(target_r=9, init_r=13)])
def test_a_rank_that_no_layer_allows_is_refused(method):
    with pytest.raises(ConfigError, match="r=13 is larger than 'wide' allows: its weight is 12 x 12"):
        attach(gated(), method)


def test_a_rank_of_its_own_is_taken_at_its_word():
    model = gated()
    with pytest.warns(UserWarning, match="1 of 4 layers"):
        attach(model, LoRA(r=4, rank_pattern={"gate": 3}, target_modules="all-linear"))
    assert {path: adapter.r for path, _, adapter in iter_adapters(model)}["gate"] == 3
    with pytest.raises(ConfigError, match="r=3 is larger than 'gate' allows"):
        attach(gated(), LoRA(r=1, init="pissa", rank_pattern={"gate": 3}, target_modules=["gate"]))


# Files of PEFT.


def llama():
    return models.build("llama")


def theirs(tmp_path, seed=3, **settings):
    """Save an adapter of PEFT's on a small model, and return its folder and its logits."""
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", models.logits(wrapped).detach()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", [["k_proj"], ["k_proj", "q_proj"]])
def test_a_wider_file_loads_as_it_is(targets, use_dora, tmp_path):
    folder, want = theirs(tmp_path, r=24, target_modules=targets, use_dora=use_dora)
    model = llama()
    before = models.logits(model).detach()
    load_peft(model, folder)
    assert {adapter.r for _, _, adapter in iter_adapters(model)} == {24}
    assert gap(models.logits(model), want) < 1e-5
    assert gap(before, want) > 1e-3

    export_peft(model, tmp_path / "ours")
    again = llama()
    load_peft(again, tmp_path / "ours")
    assert gap(models.logits(again), want) < 1e-5
    read = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert gap(models.logits(read), want) < 1e-5

    for one in (folder, tmp_path / "ours"):
        start = read_starting_adapter(llama(), str(one))
        assert all(spec["init_args"]["rank_pattern"] for spec in start.methods)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_capped_ranks_go_to_peft(method, tmp_path):
    model = llama()
    with pytest.warns(UserWarning, match="4 of 14 layers are narrower than r=20"):
        attach(model, method(r=20, target_modules="all-linear"))
    want = models.logits(perturb(model)).detach()
    export_peft(model, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert gap(models.logits(read), want) < 1e-5


def test_capped_adalora_goes_to_peft_as_adalora(tmp_path):
    model = llama()
    with pytest.warns(UserWarning, match="4 of 14 layers are narrower than init_r=20"):
        attach(model, AdaLoRA(target_r=4, init_r=20, target_modules="all-linear"))
    before = models.logits(model).detach()
    want = models.logits(perturb(model)).detach()
    export_peft(model, tmp_path / "ours", own_kind=True)
    read = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert gap(models.logits(read), want) < 1e-5
    again = llama()
    load_peft(again, tmp_path / "ours")
    assert {adapter.r for _, _, adapter in iter_adapters(again)} == {20}
    assert gap(models.logits(again), want) < 1e-5
    assert gap(before, want) > 1e-3


def test_adalora_takes_a_wide_rank_on_request():
    wide = AdaLoRA(target_r=4, target_modules="all-linear", wide_ranks=True)
    model = attached(wide)
    assert {adapter.r for _, _, adapter in iter_adapters(model)} == {6}
    with pytest.raises(ConfigError, match="init_r=6 is larger than 'gate' allows"):
        attach(gated(), AdaLoRA(target_r=4, target_modules=["gate"]))


def attached(method):
    model = gated()
    attach(model, method)
    return model


# Targets inside copies.


def roberta():
    return models.build("roberta")


def test_a_suffix_that_fits_a_copy_too_leaves_that_out():
    model = roberta()
    with pytest.warns(UserWarning, match=r"leaves out 1 modules that modules_to_save.*'classifier\.dense'") as told:
        report = attach(model, LoRA(r=2, target_modules=["query", "dense"], modules_to_save=["classifier"]))
    assert len(told) == 1
    assert "classifier" in report.hosts
    assert not any(path.startswith("classifier.") for path in report.hosts)
    assert any(path.endswith("output.dense") for path in report.hosts)


@pytest.mark.parametrize("how", ["regular expression", "copies of attach", "another method's"])
def test_however_target_and_copy_are_named(how):
    model, targets = roberta(), ["query", "dense"]
    methods, settings = LoRA(r=2, target_modules=targets, modules_to_save=["classifier"]), {}
    if how == "regular expression":
        methods = LoRA(r=2, target_modules=r".*\.(query|dense)", modules_to_save=["classifier"])
    elif how == "copies of attach":
        methods, settings = LoRA(r=2, target_modules=targets), {"modules_to_save": ["classifier"]}
    else:
        other = IA3(target_modules=["key"], feedforward_modules=[], modules_to_save=["classifier"])
        methods = [LoRA(r=2, target_modules=targets), other]
    with pytest.warns(UserWarning, match="leaves out 1 modules"):
        assert not any(path.startswith("classifier.") for path in attach(model, methods, **settings).hosts)


def test_a_name_that_only_fits_the_head_is_left_out_beside_others():
    with pytest.warns(UserWarning, match=r"leaves out 1 modules.*'classifier\.out_proj'"):
        report = attach(roberta(), LoRA(r=2, target_modules=["query", "out_proj"], modules_to_save=["classifier"]))
    assert [path for path in report.hosts if path.startswith("classifier")] == ["classifier"]


@pytest.mark.parametrize("targets", [["classifier.dense"], r"classifier\.dense", ["classifier"]])
def test_a_target_that_only_fits_a_copy_is_refused(targets):
    with pytest.raises(TargetError, match="both a target and in modules_to_save"):
        attach(roberta(), LoRA(r=2, target_modules=targets, modules_to_save=["classifier"]))


def test_peft_leaves_the_same_out(tmp_path):
    settings = {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    wrapped = peft.get_peft_model(roberta(), peft.LoraConfig(r=2, **settings)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = roberta()
    load_peft(model, tmp_path / "theirs")
    assert gap(models.logits(model), models.logits(wrapped)) < 1e-5
