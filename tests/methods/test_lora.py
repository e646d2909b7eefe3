"""How LoRA starts, and its hosts other than dense linear layers; equality with the formula is in test_peft_parity."""

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import attach, disabled, iter_adapters
from lora_lightning.methods import DoRA, LoRA
from tests.models import gap, perturb


def adapter_of(model: nn.Module) -> nn.Module:
    ((_, _, adapter),) = iter_adapters(model)
    return adapter


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize(
    ("init", "std", "largest"),
    [
        ("kaiming", (1 / 3 / 400) ** 0.5, 400**-0.5),  # uniform within ±1/sqrt(in)
        ("gaussian", 1 / 16, None),
        ("gaussian_sqrt", 1 / 4, None),
    ],
)
def test_init(kind, init, std, largest):
    model = nn.Sequential(nn.Linear(400, 300))
    attach(model, kind(r=16, init=init))
    adapter = adapter_of(model)
    assert adapter.lora_A.shape == (16, 400)
    assert adapter.lora_B.shape == (300, 16)
    assert adapter.lora_A.std().item() == pytest.approx(std, rel=0.05)
    assert adapter.lora_A.mean().item() == pytest.approx(0, abs=5 * std / 80)
    assert largest is None or adapter.lora_A.abs().max() <= largest
    assert not adapter.lora_B.any()


def test_init_of_an_embedding():
    model = nn.Sequential(nn.Embedding(400, 300))
    attach(model, LoRA(r=16, target_modules=["0"]))
    adapter = adapter_of(model)
    assert not adapter.lora_A.any()
    assert adapter.lora_B.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("host", [nn.Linear(8, 6), nn.Embedding(8, 6), nn.Conv1d(8, 6, 3)])
def test_reset_draws_anew_and_gives_the_base(host):
    model = nn.Sequential(host)
    attach(model, LoRA(r=2, target_modules=["0"]))
    adapter = adapter_of(perturb(model))
    before = adapter.lora_A.clone(), adapter.lora_B.clone()
    adapter.reset_parameters()
    assert not (adapter.lora_B @ adapter.lora_A).any()
    assert not torch.equal(adapter.lora_A, before[0])
    assert not torch.equal(adapter.lora_B, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_are_float32_or_wider(dtype):
    model = nn.Sequential(nn.Linear(8, 6)).to(dtype)
    attach(model, DoRA(r=2))
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert {parameter.dtype for parameter in adapter_of(model).parameters()} == {expected}


def test_dropout_acts_in_training_only():
    model = nn.Sequential(nn.Linear(64, 6))
    attach(model, LoRA(r=2, dropout=0.5))
    x = torch.randn(3, 64)
    perturb(model)
    torch.manual_seed(1)
    first = model.train()(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert torch.equal(model.eval()(x), model(x))
    mean = torch.stack([model.train()(x) for _ in range(2000)]).mean(0)
    assert gap(mean, model.eval()(x)) <= 5e-2


HOSTS = {
    "embedding": (lambda: nn.Embedding(12, 8, padding_idx=0), lambda: torch.randint(12, (3, 5))),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), lambda: torch.randn(2, 4, 9)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: torch.randn(2, 4, 9, 9)),
}


# torch.compile itself makes an instance of each autograd function that has a setup_context.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("name", HOSTS)
def test_other_hosts_compile_in_one_graph(name, kind):
    build, draw = HOSTS[name]
    model, x = nn.Sequential(build()), draw()
    attach(model, kind(r=2, target_modules=["0"], dropout=0.0 if name == "embedding" else 0.3))
    perturb(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for called in (model, compiled):
        torch.manual_seed(2)
        model.zero_grad()
        output = called(x)
        output.square().mean().backward()
        outputs.append([output, *[parameter.grad.clone() for parameter in adapter_of(model).parameters()]])
    assert all(gap(*both) <= 1e-5 for both in zip(*outputs, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_can_be_disabled():
    model = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    base = model(x)
    attach(model, LoRA(r=2))
    perturb(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    adapted = compiled(x)
    assert gap(adapted, base) > 1e-2
    with disabled(compiled):
        assert torch.equal(compiled(x), base)
    assert torch.equal(compiled(x), adapted)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("name", HOSTS)
def test_other_hosts_in_bfloat16(name, kind):
    build, draw = HOSTS[name]
    model, x = nn.Sequential(build()).bfloat16(), draw()
    x = x.bfloat16() if x.is_floating_point() else x
    attach(model, kind(r=2, target_modules=["0"]))
    output = perturb(model)(x)
    assert output.dtype is torch.bfloat16
    wide = model.float()
    expected = wide(x.float() if x.is_floating_point() else x)
    assert gap(output, expected) <= 2e-2
    output.float().square().mean().backward()


class PaddedSum(nn.Module):
    """An embedding whose padding is read, so that only `padding_idx` keeps it from being trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids).sum()


def test_the_padding_embedding_is_not_trained():
    model = PaddedSum()
    attach(model, LoRA(r=2, target_modules=["embed"]))
    adapter = adapter_of(perturb(model))
    model(torch.tensor([0, 3, 0])).backward()
    assert adapter.lora_A.grad[:, 3].all()
    assert not adapter.lora_A.grad[:, 0].any()
