"""Every function that takes a model takes the name of one of its adapters."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_lightning.adapters import (
    active,
    adapter_names,
    adapter_state_dict,
    disabled,
    iter_adapters,
    load_adapter_state_dict,
    set_active,
)
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.checkpoint import export_peft, load_adapter, load_peft
from lora_lightning.errors import CheckpointError, ConfigError, NotMergeable, TargetError
from lora_lightning.methods import BottleneckAdapter, DoRA, LoRA
from lora_lightning.optim import Optim, param_groups
from tests.adapters.names.several import METHODS, alone, base, move, with_names
from tests.models import gap, inputs, logits


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    return with_names()


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return logits(model)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_of_one_name_is_what_it_would_be_alone(shared, name):
    state, single = adapter_state_dict(shared, name), adapter_state_dict(alone(shared, name))
    assert list(state) == list(single)
    assert all(torch.equal(state[key], single[key]) for key in state)


def test_the_state_of_all_names_is_loaded_as_a_whole(shared):
    state = {key: value.clone() for key, value in adapter_state_dict(shared).items()}
    assert {key.split(":")[0] for key in state} == set(METHODS)
    model = with_names()
    for seed, name in enumerate(METHODS):
        move(model, name, 50 + seed)
    assert not torch.equal(answer(model), answer(shared))
    load_adapter_state_dict(model, state)
    for name in METHODS:
        with active(model, name), active(shared, name):
            assert torch.equal(answer(model), answer(shared))


def test_loading_one_name_changes_no_other(shared):
    model = copy.deepcopy(shared)
    move(model, "fr", 60)
    state = {key: value.clone() for key, value in adapter_state_dict(model, "fr").items()}
    model = copy.deepcopy(shared)
    load_adapter_state_dict(model, state, "fr")
    changed = []
    for name in METHODS:
        with active(model, name), active(shared, name):
            changed += [name] if not torch.equal(answer(model), answer(shared)) else []
    assert changed == ["fr"]


def test_a_state_of_another_name_is_refused(shared):
    model = copy.deepcopy(shared)
    with pytest.raises(CheckpointError, match="missing"):
        load_adapter_state_dict(model, adapter_state_dict(shared, "fr"), "de")
    assert torch.equal(answer(model), answer(shared))


@pytest.mark.parametrize("name", ["de", "fr", "nl"])
def test_merging_one_leaves_the_others_on_the_merged_base(shared, name):
    model, other = copy.deepcopy(shared), alone(shared, name)
    adapted = answer(other)
    merge(model, name=name)
    assert name not in adapter_names(model)
    with disabled(model):
        assert gap(answer(model), adapted) <= 1e-10
        assert gap(answer(model), answer(base())) >= 1e-3
    merge(other)
    attach(other, METHODS["it"])
    load_adapter_state_dict(other, adapter_state_dict(shared, "it"))
    with active(model, "it"):
        assert gap(answer(model), answer(other)) <= 1e-10
        assert gap(answer(model), adapted) >= 1e-3


def test_merging_a_list_merges_the_sum():
    model = base()
    for seed, name in enumerate(("de", "fr")):
        attach(model, LoRA(r=2 + seed, target_modules="all-linear"), name=name)
        move(model, name, seed)
    with active(model, ["de", "fr"]):
        expected = answer(model)
    with active(model, "de"):
        single = answer(model)
    merge(model, name=["de", "fr"])
    assert adapter_names(model) == ()
    assert gap(answer(model), expected) <= 1e-10
    assert gap(answer(model), single) >= 1e-3


def test_what_cannot_be_merged_leaves_everything_as_it_was(shared):
    model = copy.deepcopy(shared)
    with pytest.raises(NotMergeable):
        merge(model, name="pt")
    with pytest.raises(ConfigError, match="say which one is meant with name="):
        merge(model)
    assert adapter_names(model) == tuple(METHODS)
    assert torch.equal(answer(model), answer(shared))


def test_groups_hold_the_parameters_of_one_name(shared):
    found = {id(one) for group in param_groups(shared, Optim(lr=1e-3), "fr") for one in group["params"]}
    own = {id(one) for _, _, adapter in iter_adapters(shared, "fr") for one in adapter.parameters()}
    assert found == own
    everything = {id(one) for group in param_groups(shared, Optim(lr=1e-3)) for one in group["params"]}
    assert found < everything
    with pytest.raises(ConfigError, match="no adapter named 'xx'"):
        param_groups(shared, Optim(lr=1e-3), "xx")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["de", "fr", "nl"])
def test_folders_of_one_name_are_read_by_peft(shared, name, tmp_path):
    export_peft(shared, tmp_path / name, name=name)
    with active(shared, name):
        expected = answer(shared)
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / name)).double().eval()
    with torch.no_grad():
        found = theirs(**inputs(base())).logits
    assert gap(found, expected) <= 1e-6
    assert gap(found, answer(base())) >= 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_folders_are_loaded_side_by_side(shared, tmp_path):
    names = ("de", "fr", "nl")
    for name in names:
        export_peft(shared, tmp_path / name, name=name)
    model = base()
    for name in names:
        load_peft(model, tmp_path / name, name=name)
    for name in names:
        with active(model, name), active(shared, name):
            assert gap(answer(model), answer(shared)) <= 1e-10
    with pytest.raises(TargetError, match=r"name=..."):
        load_peft(model, tmp_path / "de")
    assert adapter_names(model) == names


def test_a_folder_is_loaded_into_one_name(shared, tmp_path):
    export_peft(shared, tmp_path / "fr", name="fr")
    model = copy.deepcopy(shared)
    move(model, "fr", 70)
    with active(model, "fr"), active(shared, "fr"):
        assert gap(answer(model), answer(shared)) >= 1e-3
    with pytest.raises(CheckpointError, match="LoRA"):
        load_adapter(model, tmp_path / "fr", name="nl")
    with pytest.raises(ConfigError, match="say which one"):
        load_adapter(model, tmp_path / "fr")
    load_adapter(model, tmp_path / "fr", name="fr")
    for name in METHODS:
        with active(model, name), active(shared, name):
            assert gap(answer(model), answer(shared)) <= 1e-7


def test_a_folder_of_another_base_leaves_the_others(shared, tmp_path):
    export_peft(shared, tmp_path / "de", name="de")
    model = base()
    attach(model, DoRA(r=1, target_modules=["query"]), name="first")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.add_(1)
    before = answer(model)
    with pytest.raises(CheckpointError, match="another base"):
        load_peft(model, tmp_path / "de", name="de")
    assert adapter_names(model) == ("first",)
    assert torch.equal(answer(model), before)


def test_exporting_needs_a_name(shared, tmp_path):
    with pytest.raises(ConfigError, match="say which one"):
        export_peft(shared, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_one_name_moves_no_other():
    model = base()
    attach(model, LoRA(r=2, target_modules="all-linear"), name="de")
    attach(model, BottleneckAdapter(width=4), name="pt")
    set_active(model, "pt")
    start = {name: {k: v.clone() for k, v in adapter_state_dict(model, name).items()} for name in ("de", "pt")}
    optimizer = torch.optim.SGD(param_groups(model, Optim(lr=0.1), "pt"))
    for _ in range(3):
        logits(model).square().sum().backward()
        optimizer.step()
    now = {name: adapter_state_dict(model, name) for name in ("de", "pt")}
    assert all(torch.equal(now["de"][key], start["de"][key]) for key in now["de"])
    assert not all(torch.equal(now["pt"][key], start["pt"][key]) for key in now["pt"])
