import pytest
from torch import nn

from lora_lightning.adapters import Adapter, InputAdapter, Method, PlainView, Role
from lora_lightning.errors import NotMergeable
from lora_lightning.methods import LoRA
from tests.adapters.toys import BiasDelta, InputScale, TiedModel


def test_training_hooks_do_nothing_by_default():
    model, method = nn.Linear(2, 2), LoRA()
    assert method.calibrate(model, [], lambda batch: batch) is None
    assert method.extra_loss(model) is None
    assert method.before_step(model, 0, 1) is None
    assert method.after_step(model, 0, 1) is None
    assert method.fit_to_state(model, {}) is None
    assert method.extra_state(model) == {}
    assert method.load_extra_state(model, {}) is None


def test_a_method_must_say_what_it_adds():
    with pytest.raises(TypeError, match="abstract"):
        Method()


def test_roles_are_declared_not_guessed():
    assert [(name, role) for name, _, role in BiasDelta(3).named_roles()] == [("delta", Role.BIAS)]
    adapter = InputAdapter()
    adapter.undeclared = nn.Parameter(nn.Linear(2, 2).weight)
    with pytest.raises(KeyError, match="undeclared"):
        list(adapter.named_roles())


def test_an_adapter_without_a_merged_weight_cannot_merge():
    host = nn.Linear(3, 3)
    with pytest.raises(NotMergeable, match="InputScale changes more than a weight"):
        InputScale(3).check_mergeable(host)
    with pytest.raises(NotImplementedError):
        Adapter().merge_into(host)


def test_plain_view():
    model = TiedModel()
    view = PlainView(model)
    assert (view.model_type, view.usual_targets(), view.head_paths()) == (None, None, [])
    bias = nn.Parameter(model.body.bias.detach().clone())
    model.out.bias = bias
    model.out.requires_grad_(False)
    view.untie("out")
    assert model.out.weight is not model.embed[0].weight
    assert not model.out.weight.requires_grad
    assert model.out.bias is bias
