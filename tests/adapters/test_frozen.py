"""What of a frozen base is no parameter stays as it is in training."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lora_lightning.adapters import adapter_state_dict, attach, detach, disabled, load_adapter_state_dict, merge
from lora_lightning.adapters.frozen import has_statistics
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import BitFit, LoRA
from tests.adapters.norm_models import NORMS, OTHERS, ConvNet, build, images
from tests.models import gap, perturb


def base_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "_lora_lightning" not in name}


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


def train(model, num_batches=4):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Training moved")
        for seed in range(num_batches):
            model.train()  # as Lightning does after each validation
            model(images(seed)).square().sum().backward()
    return model


def targets(model):
    """Adapt every convolution that can be adapted."""
    kinds = nn.Conv2d, nn.Linear
    return [name for name, one in model.named_modules() if type(one) in kinds and "weight" in one._parameters]


def method_for(model):
    grouped = [name for name, module in model.named_modules() if getattr(module, "groups", 1) > 1]
    return LoRA(r=1, target_modules=targets(model), exclude_modules=grouped or None)


@pytest.mark.parametrize("name", [*NORMS, *OTHERS])
def test_nothing_of_the_base_moves(name):
    free = build(name)
    before = base_state(free)
    assert moved(before, base_state(train(free))), "without attach, training must move something"

    model = build(name)
    attach(model, method_for(model))
    train(model)
    assert moved(before, base_state(model)) == []
    detach(model)
    assert moved(before, model.state_dict()) == []
    assert moved(before, base_state(train(model))), "after detach it moves again"


@pytest.mark.parametrize("name", [*NORMS, "names of its own"])
def test_training_computes_with_the_stored_statistics(name):
    model = build(name)
    train(model, 2)  # statistics that are not those of a fresh norm
    batch_statistics = model.train()(images()).detach()
    expected = model.eval()(images()).detach()
    before = base_state(model)
    attach(model, method_for(model))
    train(model, 1)  # a norm by other names shows itself in the first batch
    assert gap(model.train()(images()), expected) < 1e-5
    assert gap(batch_statistics, expected) > 1e-3
    assert moved(before, base_state(model)) == []


def test_modules_are_in_the_mode_of_their_model_after_detach():
    model = ConvNet(nn.BatchNorm2d(8)).eval()
    attach(model, LoRA(r=1, target_modules=["conv"]))
    model.train()
    assert not model.norm.training
    assert type(model.norm).__qualname__ == "BatchNorm2d"
    detach(model)
    assert model.norm.training
    assert type(model.norm) is nn.BatchNorm2d
    assert not [name for name in model.norm.__dict__ if "lora" in name]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["batch", "hand-written", "names of its own", "counter"])
def test_copies_stay_frozen(name, clone):
    model = build(name)
    before = base_state(model)
    attach(model, LoRA(r=1, target_modules=["conv", "out"]))
    for trained in (0, 2):
        twin = clone(train(model, trained))
        assert moved(before, base_state(train(twin))) == []
        detach(twin)
        assert moved(before, base_state(train(twin)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["batch", "with activation", "hand-written", "names of its own", "counter"])
def test_compiled_models_stay_frozen(name, inside):
    model = build(name)
    if name == "counter":
        model.norm.calls = 5  # a plain number that changes would be compiled anew each time
        model.norm.__class__.forward = lambda self, x: (self.steps.add_(self.training), self.inner(x))[1]
    before = base_state(model)
    attach(model, LoRA(r=1, target_modules=["conv", "out"]))
    compiled = torch.compile(lambda x: model(x) if inside else model, backend="aot_eager", fullgraph=True)
    compiled = compiled if inside else torch.compile(model, backend="aot_eager")
    for seed in range(3):
        model.train()
        compiled(images(seed)).square().sum().backward()
    assert moved(before, base_state(model)) == []


def test_a_buffer_that_is_loaded_later_counts_as_the_base():
    model = build("names of its own")
    attach(model, LoRA(r=1, target_modules=["conv"]))
    train(model)
    with torch.no_grad():
        model.norm.center.fill_(3)
    train(model)
    assert torch.equal(model.norm.center, torch.full((8, 1, 1), 3.0))


def test_writes_through_data_are_put_back_every_time():
    class Counting(ConvNet):
        def __init__(self):
            super().__init__(nn.BatchNorm2d(8))
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps.data.add_(self.training)
            return super().forward(x)

    model = Counting()
    attach(model, LoRA(r=1, target_modules=["conv"]))
    assert train(model).steps == 0
    detach(model)
    assert train(model).steps == 4


def test_what_was_put_back_is_told_once():
    model = build("counter")
    attach(model, LoRA(r=1, target_modules=["conv", "out"]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            model.train()(images())
    assert len([one for one in told if "'norm.steps'" in str(one.message)]) == 1


def test_a_module_that_was_replaced_or_pruned_is_left_alone():
    model = ConvNet(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8)))
    attach(model, LoRA(r=1, target_modules=["conv"]))
    model.norm[0] = nn.Identity()
    train(model)


def test_norms_that_were_converted_are_frozen_again():
    model = build("batch")
    attach(model, LoRA(r=1, target_modules=["conv"]))
    before = base_state(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted.norm) is nn.SyncBatchNorm
    train(converted)
    assert moved(before, base_state(converted)) == []


# Statistics that train.


def with_statistics(name, **settings):
    model = build(name)
    attach(model, method_for(model), train_norm_statistics=True, **settings)
    return model


@pytest.mark.parametrize("name", NORMS)
def test_statistics_train_as_they_do_without_adapters(name):
    free, model = build(name), with_statistics(name)
    before = base_state(free)
    train(free)
    train(model)
    state = adapter_state_dict(model)
    keys = moved(before, free.state_dict())
    assert keys
    assert set(keys) <= state.keys()
    assert all(torch.equal(state[key], free.state_dict()[key]) for key in keys)
    assert all(gap(state[key].float(), before[key].float()) > 1e-3 for key in keys)
    assert moved(before, base_state(model)) == []
    assert gap(model.eval()(images()), free.eval()(images())) < 1e-5


@pytest.mark.parametrize("name", NORMS)
def test_statistics_travel_and_merge(name):
    model, base = with_statistics(name), build(name)
    train(perturb(model))
    want = model.eval()(images())
    with disabled(model):
        assert gap(model(images()), base.eval()(images())) < 1e-6
        before = base_state(model)
        with torch.no_grad():  # in training mode the base answers with its stored statistics, and moves none
            assert gap(model.train()(images()), base(images())) < 1e-6
        assert moved(before, base_state(model)) == []
    model.eval()
    fresh = with_statistics(name)
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    assert gap(fresh.eval()(images()), model(images())) < 1e-6
    twin = pickle.loads(pickle.dumps(model))
    assert gap(twin(images()), model(images())) < 1e-6
    merge(twin)
    assert gap(twin(images()), model(images())) < 1e-4
    detach(model)
    assert gap(model(images()), base(images())) < 1e-6
    assert gap(want, base(images())) > 1e-3


def test_trained_statistics_take_the_hosts_weights():
    model = with_statistics("batch")
    with torch.no_grad():
        model.norm.weight.fill_(2)
    twin = copy.deepcopy(model)
    assert [parameter for name, parameter in twin.named_parameters() if "norm_statistics" in name] == []
    expected = nn.functional.batch_norm(model.conv(images()), None, None, model.norm.weight, None, True)
    assert gap(twin.norm.train()(twin.conv(images())), expected) < 1e-5


def test_conversion_keeps_trained_statistics():
    plain, model = train(with_statistics("batch")), with_statistics("batch")
    converted = train(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    expected, state = adapter_state_dict(plain), adapter_state_dict(converted)
    assert state.keys() == expected.keys()
    assert gap(state["norm.running_mean"], expected["norm.running_mean"]) < 1e-6
    assert gap(converted.norm.running_mean, expected["norm.running_mean"]) > 0.1


def test_a_copied_norm_keeps_its_own_statistics():
    model = build("batch")
    attach(model, LoRA(r=1, target_modules=["conv"]), modules_to_save=["norm"], train_norm_statistics=False)
    before = base_state(model)
    train(model)
    assert moved(before, base_state(model)) == []
    assert not torch.equal(adapter_state_dict(model)["norm.running_mean"], before["norm.running_mean"])
    with disabled(model), torch.no_grad():
        model.train()(images())
    assert moved(before, base_state(model)) == []
    detach(pickle.loads(pickle.dumps(model)))


def test_a_model_without_such_norms_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match="no norm with running statistics"):
        attach(model, BitFit(), train_norm_statistics=True)


def test_the_setting_is_named_where_statistics_find_no_place():
    state = adapter_state_dict(with_statistics("batch"))
    model = build("batch")
    attach(model, method_for(model))
    with pytest.raises(CheckpointError, match="train_norm_statistics=True"):
        load_adapter_state_dict(model, state)


def test_what_counts_as_a_norm_with_statistics():
    assert has_statistics(nn.SyncBatchNorm(4))
    assert not has_statistics(nn.BatchNorm1d(4, track_running_stats=False))
    assert not has_statistics(nn.GroupNorm(2, 4))
