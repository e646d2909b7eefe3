"""The look at a model's first calls: what is not called, and what is read without being called."""

import copy
import pickle
import sys
import threading
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lora_lightning.adapters import attach, disabled
from lora_lightning.adapters.calls import watch
from lora_lightning.adapters.targets import select_weights
from lora_lightning.adapters.view import PlainView
from lora_lightning.errors import AdapterNotCalled, TargetError
from lora_lightning.methods import BitFit, DoRA, LoRA
from tests import models


class Shared(nn.Module):
    """Uses the weight of one layer twice: by a call, and by hand."""

    def __init__(self, by_hand):
        super().__init__()
        self.first, self.other, self.by_hand = nn.Linear(4, 4), nn.Linear(4, 4), by_hand

    def forward(self, x):
        return self.by_hand(self, torch.tanh(self.other(self.first(x))))


BY_HAND = {
    "linear": lambda net, x: F.linear(x, net.first.weight),
    "transposed": lambda net, x: x @ net.first.weight.T,
    "through data": lambda net, x: x @ net.first.weight.data,
    "in a list": lambda net, x: x @ torch.cat([net.first.weight, net.first.weight]).t(),
    "by keyword": lambda net, x: F.linear(input=x, weight=net.first.weight),
    "an element": lambda net, x: x * net.first.weight[0],
}
HARMLESS = {
    "dtype": lambda net, x: x.to(net.first.weight.dtype),
    "shape": lambda net, x: x[..., : net.first.weight.shape[0]] + net.first.weight.dim(),
    "device": lambda net, x: x.to(net.first.weight.device),
    "gradient": lambda net, x: x if net.first.weight.grad is None else -x,
    "bias": lambda net, x: x + net.first.bias,
    "called by forward": lambda net, x: net.first.forward(x),
    "called again": lambda net, x: net.first(x),
}
X = torch.ones(2, 4)


def has_hooks(model):
    return bool(model._forward_hooks or model._forward_pre_hooks)


def adapted(model, *targets, method=LoRA, **settings):
    attach(model, method(r=1, target_modules=list(targets)), **settings)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_weight_that_is_read_by_hand_is_refused(name, training):
    model = adapted(Shared(BY_HAND[name]), "first", "other").train(training)
    with pytest.raises(TargetError, match="reads 'weight' of 'first' without calling"):
        model(X)
    assert not _get_current_function_mode_stack()
    assert "forward" not in model.first.__dict__
    adapted(Shared(BY_HAND[name]), "other").train(training)(X)  # where no adapter hangs, nothing is wrong


@pytest.mark.parametrize("name", HARMLESS)
def test_what_reads_no_weight_is_fine(name):
    model = adapted(Shared(HARMLESS[name]), "first", "other").train()
    model(X).sum().backward()
    assert not has_hooks(model)


def test_a_bias_matters_to_those_who_train_it():
    model = Shared(HARMLESS["bias"]).train()
    attach(model, BitFit())
    with pytest.raises(TargetError, match="reads 'bias' of 'first'"):
        model(X)


@pytest.mark.parametrize("name", ["linear", "bias"])
def test_a_copy_that_is_read_past_is_refused(name):
    model = Shared({**BY_HAND, **HARMLESS}[name]).train()
    attach(model, LoRA(r=1, target_modules=["other"]), modules_to_save=["first"])
    with pytest.raises(TargetError, match="of 'first' without calling"):
        model(X)


class Router(nn.Module):
    """Holds a matrix that it multiplies with, and that its owner may use without calling it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight.t()


class RouterOwner(nn.Module):
    def __init__(self, is_read_past):
        super().__init__()
        self.router, self.is_read_past = Router(), is_read_past

    def forward(self, x):
        return x @ self.router.weight if self.is_read_past else self.router(x)


class KnownReads(PlainView):
    def read_past(self):
        return {"router": frozenset(["weight"])} if self.model.is_read_past else {}


def test_a_parameter_that_is_read_past_its_module_is_refused():
    method = LoRA(r=1, target_modules=["router.weight"])
    with pytest.raises(TargetError, match="reads 'weight' of 'router' without calling"):
        select_weights(KnownReads(RouterOwner(True)), method)
    assert [path for path, _ in select_weights(KnownReads(RouterOwner(False)), method)] == ["router.weight"]
    model = RouterOwner(True).train()
    attach(model, method)
    with pytest.raises(TargetError, match="reads 'weight' of 'router' without calling"):
        model(X)


def test_a_tied_weight_is_read_by_its_owners():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    adapted(model, "0").train()(X)


class Routed(nn.Module):
    """A mixture by hand: only the chosen experts are called."""

    def __init__(self):
        super().__init__()
        self.experts, self.out = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), nn.Linear(4, 2)

    def forward(self, x, chosen=(0, 1, 2)):
        return self.out(sum(self.experts[index](x) for index in chosen))


def test_idle_adapters_are_an_error_in_training_alone():
    model = adapted(Routed(), "experts.0", "experts.1", "experts.2", "out").eval()
    with pytest.warns(UserWarning, match="2 of 4 adapters were not called"):
        model(X, (0,))
    model(X, (1,))  # told once
    with pytest.raises(AdapterNotCalled, match=r"1 of 4 adapters were not called.*'experts\.2'"):
        model.train()(X, (0,))
    model(X, (0,))  # checked once
    assert not has_hooks(model)


class Dropping(nn.Module):
    """Drops layers in training by chance, as BART does: here, all but those that `kept` names."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.layers, self.out, self.layerdrop = (
            nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]),
            nn.Linear(4, 2),
            rate,
        )
        self.side = nn.Linear(4, 4)

    def forward(self, x, kept=(0, 1, 2), by_side=True):
        for index in kept:
            x = self.layers[index](x)
        return self.out(self.side(x) if by_side else x)


def test_layers_that_are_dropped_have_some_batches_time():
    model = adapted(Dropping(), "layers.0", "layers.1", "layers.2", "side", "out").train()
    model(X, (1, 2))
    model(X, (0,))
    assert not has_hooks(model)
    model = adapted(Dropping(), "layers.0", "layers.1", "layers.2", "side", "out").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(31):
            model(X, (1, 2))
    with pytest.warns(UserWarning, match=r"32 batches later: 1 of 5 adapters were not called.*'layers\.0'"):
        model(X, (1, 2))
    model(X, (1, 2))
    assert not has_hooks(model)


@pytest.mark.parametrize(("rate", "by_side"), [(0.0, True), (0.5, False)])
def test_what_is_not_dropped_is_an_error(rate, by_side):
    model = adapted(Dropping(rate), "layers.0", "layers.1", "side", "out").train()
    with pytest.raises(AdapterNotCalled, match="1 of 4"):
        model(X, (1,) if by_side else (0, 1), by_side)


def test_wav2vec2_drops_layers():
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = transformers.Wav2Vec2Config(**sizes, **convolutions, layerdrop=0.5, mask_time_prob=0.0, num_labels=3)
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    attach(model, LoRA(r=1, target_modules=["q_proj", "v_proj"]))
    model.train()
    called = []
    for layer in model.wav2vec2.encoder.layers:
        layer.register_forward_hook(lambda *_: called.append(1))
    model(torch.randn(1, 800)).logits.sum().backward()
    assert len(called) < 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            model(torch.randn(1, 800)).logits.sum().backward()
    assert not has_hooks(model)


def test_each_adapter_of_a_host_counts():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer.forward(x)  # which hooks do not see

    model = Direct()
    attach(model, [LoRA(r=1, target_modules=["layer"]), BitFit()])
    with pytest.raises(AdapterNotCalled, match=r"1 of 2 adapters were not called.*'layer'"):
        model.train()(X)


def test_a_batch_that_calls_all_ends_the_watch():
    model = adapted(Routed(), "experts.0", "out").train()
    assert has_hooks(model)
    model(X)
    assert not has_hooks(model)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, None])
def test_what_is_no_real_batch_does_not_count(context):
    model = adapted(Routed(), "experts.0", "experts.1", "out").train()
    with disabled(model) if context is None else context():
        model(X, (0,))
    assert has_hooks(model)
    with pytest.raises(AdapterNotCalled):
        model(X, (0,))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_fails_is_not_judged(error):
    model = adapted(Routed(), "experts.0", "out").train()

    def fail(*_):
        raise error("of the model's own")

    handle = model.out.register_forward_pre_hook(fail)
    with pytest.raises(error, match="of the model's own"):
        model(X)
    handle.remove()
    model(X).sum().backward()
    assert not _get_current_function_mode_stack()
    assert not has_hooks(model)
    assert "forward" not in model.out.__dict__


def test_errors_around_the_call_are_none_of_it():
    model = adapted(Routed(), "experts.0", "experts.1", "out").train()
    try:
        raise RuntimeError("earlier")
    except RuntimeError:
        with pytest.raises(AdapterNotCalled):
            model(X, (0,))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_for_themselves(clone):
    twin = clone(adapted(Routed(), "experts.0", "experts.1").train())
    with pytest.raises(AdapterNotCalled):
        twin(X, (0,))
    twin(X)
    assert not has_hooks(twin)


@pytest.fixture
def eager_switches():
    """Have threads switch after nearly every operation, so that a race shows in every run."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switches")
def test_threads_do_not_end_each_others_watch():
    model, errors = adapted(Routed(), *[f"experts.{i}" for i in range(3)], "out").train(), []
    barrier = threading.Barrier(8)

    def run():
        barrier.wait()
        try:
            model(X).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    model(X)
    assert not has_hooks(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_checkpoints_are_fine(method, reentrant):
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.out = block, nn.Linear(4, 2)

        def forward(self, x):
            return self.out(checkpoint(self.block, x, use_reentrant=reentrant))

    model = adapted(Outer(), "block.0", "out", method=method).train()
    model(X.clone().requires_grad_()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not has_hooks(model)


@pytest.mark.parametrize("name", [*models.ARCHITECTURES, *models.MIXTURES, *models.RELATIVES])
@pytest.mark.parametrize("training", [False, True])
def test_no_false_alarm_on_transformers_models(name, training):
    model = models.build(name).train(training)
    attach(model, LoRA(r=1, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.logits(model)
    has_buffers = name in ("deepseek_v3", "nemotron_h")  # persistent ones of routers, which are watched on
    assert has_hooks(model) is (has_buffers or not training)


def test_torchs_own_encoder_layers_give_no_false_alarm():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    attach(model, LoRA(r=1, target_modules=["linear1", "linear2"]))
    model.eval()(torch.ones(1, 3, 8))


def test_watch_sees_calls_and_reads():
    model = Shared(BY_HAND["linear"])
    with watch(model, [model.first]) as calls:
        model(X)
    assert calls.called == {id(model), id(model.first)}
    assert calls.read_past == {id(model.first): {"weight"}}
    with watch(model, [model.first], reads=False) as calls:
        model(X)
    assert calls.read_past == {}
