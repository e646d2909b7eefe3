"""Weights rebuilt in one pass or both, and inputs computed again: equal to the formula, and chosen where they pay."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_lightning.adapters import disabled
from lora_lightning.adapters.functional import (
    NOT_REBUILT,
    Rebuilt,
    dora,
    find_source,
    lora,
    lora_linear,
    rebuilding_pays,
    rebuilt_dora_linear,
)
from lora_lightning.adapters.functional.recompute import Source
from lora_lightning.backbones.attach import attach
from lora_lightning.methods import DoRA, LoRA, LoRAFA
from tests.adapters.test_functional import NUM_OUT, SCALING, gradients, plain, problem
from tests.models import gap, perturb

BOTH, FORWARD, BACKWARD = Rebuilt(True, True), Rebuilt(True, False), Rebuilt(False, True)
DORA = "dora"


def rebuilt(drawn: dict[str, Tensor | None], form: Rebuilt | str, *, read: bool = False) -> Tensor:
    x, weight, bias, a, b, magnitude = drawn.values()
    source = (lambda: weight) if read else weight
    if isinstance(form, str):
        return rebuilt_dora_linear(x, source, bias, a, b, magnitude, SCALING)
    return lora_linear(x, source, bias, a, b, SCALING, rebuilt=form)


FORMS = pytest.mark.parametrize(
    "form", [DORA, BOTH, FORWARD, BACKWARD, NOT_REBUILT], ids=["dora", "both", "forward", "backward", "neither"]
)
BIAS = pytest.mark.parametrize("bias", [False, True])


@FORMS
@BIAS
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_plain_formula(form, bias, read, dtype, tolerance):
    drawn, dora = problem(dtype, bias=bias), form == DORA
    actual, expected = rebuilt(drawn, form, read=read), plain(drawn, dora=dora)
    assert actual.dtype is dtype
    assert gap(actual, expected) <= tolerance
    ours, reference = gradients(actual, drawn, dora=dora), gradients(expected, drawn, dora=dora)
    assert all(gap(*both) <= 10 * tolerance for both in zip(ours, reference, strict=True))
    without_update = F.linear(drawn["x"], drawn["weight"], drawn["bias"])
    assert gap(actual, without_update) > 1e-2


@FORMS
@BIAS
def test_gradcheck(form, bias):
    drawn = problem(bias=bias)
    x, weight, b, lora_a, lora_b, magnitude = drawn.values()
    if form == DORA:  # the norm is a constant in backward, so only x and the magnitude have true derivatives
        assert gradcheck(
            lambda *v: rebuilt_dora_linear(v[0], weight, b, lora_a.detach(), lora_b.detach(), v[1], SCALING),
            (x, magnitude),
        )
    else:
        assert gradcheck(
            lambda *v: lora_linear(v[0], weight, b, v[1], v[2], SCALING, rebuilt=form), (x, lora_a, lora_b)
        )


@pytest.mark.parametrize("form", [BOTH, FORWARD, BACKWARD])
def test_dropout_is_not_lost_in_a_rebuilt_weight(form):
    x, weight, bias, a, b, _ = problem().values()
    with pytest.raises(ValueError, match="Dropout acts on the input of A"):
        lora_linear(x, weight, bias, a, b, SCALING, 0.5, torch.tensor(1), rebuilt=form)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 4), (0,)])
@FORMS
def test_any_leading_dimensions(lead, form):
    drawn, dora = problem(lead=lead), form == DORA
    output = rebuilt(drawn, form)
    assert output.shape == (*lead, NUM_OUT)
    torch.testing.assert_close(output, plain(drawn, dora=dora))
    gradients(output, drawn, dora=dora)


def test_a_magnitude_of_zero_stays():
    drawn = problem()
    with torch.no_grad():
        drawn["magnitude"][0] = 0
    rebuilt(drawn, DORA).sum().backward()
    assert drawn["magnitude"].grad[0] == 0
    assert (drawn["magnitude"].grad[1:] != 0).all()


@pytest.mark.parametrize(
    ("tokens", "num_out", "dtype", "stored", "expected"),
    [
        (1024, 32, torch.float32, torch.float32, BOTH),
        (65, 64, torch.float32, torch.float32, BOTH),
        (64, 64, torch.float32, torch.float32, NOT_REBUILT),
        (100, 128, torch.float32, torch.float32, FORWARD),
        (50, 32, torch.float32, torch.float32, BACKWARD),
        (1024, 32, torch.float64, torch.float64, BOTH),
        (1024, 32, torch.bfloat16, torch.bfloat16, NOT_REBUILT),
        (1024, 32, torch.float32, torch.bfloat16, NOT_REBUILT),
        (1024, 32, torch.float32, None, NOT_REBUILT),
    ],
)
def test_when_rebuilding_pays(tokens, num_out, dtype, stored, expected):
    assert rebuilding_pays(torch.ones(tokens, 64, dtype=dtype), num_out, stored) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(22, BOTH), (21, NOT_REBUILT)])
def test_when_rebuilding_both_passes_at_once_pays(tokens, expected):
    x = torch.ones(tokens, 64)
    assert rebuilding_pays(x, 32, torch.float32, both_or_neither=True) == expected
    assert rebuilding_pays(x, 32, torch.float32) == NOT_REBUILT


def test_autocast_never_rebuilds():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rebuilding_pays(torch.ones(1024, 64), 32, torch.float32) == NOT_REBUILT


def one_layer(
    method: LoRA, monkeypatch: pytest.MonkeyPatch, host: nn.Module | None = None
) -> tuple[nn.Module, list[str]]:
    """Return an adapted linear layer, and a list that notes each rebuilding."""
    torch.manual_seed(0)
    model = nn.Sequential(host or nn.Linear(16, 12))
    attach(model, method)
    perturb(model)
    calls: list[str] = []
    for module in (lora, dora):

        def noting(*args, _function=module.rebuild):
            calls.append("rebuilt")
            return _function(*args)

        monkeypatch.setattr(module, "rebuild", noting)
    return model.train(), calls


@pytest.mark.parametrize(
    ("method", "tokens", "in_passes"),
    [
        (LoRA(r=2), 64, (1, 1)),
        (LoRA(r=2), 14, (0, 1)),  # more than the 12 outputs, not more than the 16 inputs
        (LoRA(r=2), 12, (0, 0)),
        (DoRA(r=2), 64, (1, 1)),
    ],
)
def test_a_layer_gives_the_same_whichever_pass_rebuilds(method, tokens, in_passes, monkeypatch):
    model, calls = one_layer(method, monkeypatch)
    x = torch.randn(tokens, 16, requires_grad=True)
    together = model(x)
    assert len(calls) == in_passes[0]
    together.square().sum().backward()
    assert len(calls) == sum(in_passes)
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]
    calls.clear()
    one_by_one = x.detach().requires_grad_()
    model.zero_grad()
    apart = torch.cat([model(row[None]) for row in one_by_one])
    apart.square().sum().backward()
    assert not calls
    torch.testing.assert_close(together, apart)
    references = [one_by_one.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]
    assert all(gap(*both) <= 1e-5 for both in zip(gradients, references, strict=True))
    with disabled(model):
        assert gap(model(x), apart) > 1e-2


@pytest.mark.parametrize("method", [LoRA(r=2, dropout=0.5), LoRAFA(r=2)], ids=["dropout", "frozen A"])
def test_what_is_never_rebuilt(method, monkeypatch):
    model, calls = one_layer(method, monkeypatch)
    model(torch.randn(64, 16, requires_grad=True)).sum().backward()
    assert not calls


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2)], ids=["lora", "dora"])
@pytest.mark.parametrize(("tokens", "in_lora"), [(80, 2), (32, 1)])
def test_a_four_bit_host_is_rebuilt_too(method, tokens, in_lora, monkeypatch):
    torch.manual_seed(0)
    host = Linear4bit(64, 12, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    model, calls = one_layer(method, monkeypatch, host)
    stored = host.weight.detach().clone()
    x = torch.randn(tokens, 64, requires_grad=True)
    together = model(x)
    (grad,) = torch.autograd.grad(together.square().sum(), x)
    assert len(calls) == (2 if isinstance(method, DoRA) else in_lora)
    calls.clear()
    apart = torch.cat([model(row[None]) for row in x])
    assert not calls
    (reference,) = torch.autograd.grad(apart.square().sum(), x)
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(grad, reference)
    assert torch.equal(host.weight, stored)


SOURCES = {
    "gelu": lambda z: F.gelu(z),
    "tanh gelu": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "gated": lambda z: F.silu(z) * (2 * z),
}


@pytest.mark.parametrize("activation", SOURCES.values(), ids=SOURCES)
def test_the_source_gives_the_input_back(activation):
    z = torch.randn(5, 3, requires_grad=True)
    x = activation(z)
    source = find_source(x)
    assert isinstance(source, Source)
    assert all(tensor is not x for tensor in source.tensors)
    assert torch.equal(source.compute(*source.tensors), x)


@pytest.mark.parametrize("x", [torch.randn(3), F.relu(torch.randn(3, requires_grad=True)) + 1], ids=["leaf", "sum"])
def test_other_inputs_have_no_source(x):
    assert find_source(x) is None


def test_no_source_inside_checkpoint():
    seen = []

    def block(z: Tensor) -> Tensor:
        x = F.gelu(z)
        seen.append(find_source(x))
        return x.sum()

    z = torch.randn(4, requires_grad=True)
    checkpoint(block, z, use_reentrant=False).backward()
    assert seen
    assert set(seen) == {None}


def feed_forward(method: LoRA) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    attach(model, method)
    return perturb(model).train()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), LoRA(r=2, dropout=0.3), DoRA(r=2), DoRA(r=2, dropout=0.3)],
    ids=["lora", "lora dropout", "dora", "dora dropout"],
)
def test_recomputing_changes_nothing_and_keeps_less(method):
    x = torch.randn(64, 8)
    figures = {}
    for recompute in (False, True):
        model = feed_forward(method)
        for module in model.modules():
            if hasattr(module, "recomputes_input"):
                module.recomputes_input = recompute
        torch.manual_seed(1)
        output = model(x)
        output.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        torch.manual_seed(1)
        figures[recompute] = output.detach(), gradients, saved_bytes(model, x)
    (kept, of_kept, bytes_kept), (again, of_again, bytes_again) = figures.values()
    assert torch.equal(kept, again)
    assert all(torch.equal(*both) for both in zip(of_kept, of_again, strict=True))
    assert bytes_kept - bytes_again == 64 * 32 * 4  # the activation's output, no more and no less
