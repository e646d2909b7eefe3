"""LoRA and DoRA against PEFT with copied weights, and against the plain formula in float64."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from lora_lightning.adapters import iter_adapters, iter_roles
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.methods import DoRA, LoRA
from tests import models

RANK, ALPHA = 4, 8
pytestmark = [
    # PEFT's own use of transformers, and its advice about tied embeddings.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]


def with_peft(model: nn.Module, hosts: tuple[str, ...], **settings) -> nn.Module:
    """Hang PEFT's adapters on the same modules."""
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(hosts), **settings}
    if model.config.model_type == "gpt2":
        settings["fan_in_fan_out"] = True
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def pairs(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return each of our adapter parameters with PEFT's counterpart."""
    found = {}
    for path, _, adapter in iter_adapters(ours):
        host = theirs.base_model.model.get_submodule(path)
        for name, parameter in adapter.named_parameters():
            found[f"{path}.{name}"] = (parameter, peft_parameter(host, name))
    return found


def peft_parameter(host: nn.Module, name: str) -> nn.Parameter:
    if name == "magnitude":
        return host.lora_magnitude_vector["default"].weight
    if hasattr(host, "lora_embedding_A") and "default" in host.lora_embedding_A:
        return getattr(host, name.replace("lora_", "lora_embedding_"))["default"]
    return getattr(host, name)["default"].weight


@torch.no_grad()
def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for parameter, counterpart in pairs(ours, theirs).values():
        assert parameter.numel() == counterpart.numel()
        counterpart.copy_(parameter.view_as(counterpart))


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits and the gradient of the input embeddings; the parameters' gradients are left on them."""
    model.zero_grad()
    batch = dict(batch)
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    output = model(inputs_embeds=embedded, **batch).logits
    output.square().mean().backward()
    return output.detach(), embedded.grad


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_equals_peft(architecture, kind):
    ours, theirs = models.build(architecture), models.build(architecture)
    batch = models.inputs(ours)
    untouched, _ = run(copy.deepcopy(ours).requires_grad_(), batch)
    hosts = attach(ours, kind(r=RANK, alpha=ALPHA, target_modules="all-linear")).hosts
    models.perturb(ours)
    theirs = with_peft(theirs, hosts, use_dora=kind is DoRA)
    copy_weights(ours, theirs)

    (output, dx), (expected, expected_dx) = run(ours, batch), run(theirs, batch)
    assert models.gap(output, untouched) > 1e-2
    assert models.gap(output, expected) <= 1e-5
    assert models.gap(dx, expected_dx) <= 1e-5
    for name, (parameter, counterpart) in pairs(ours, theirs).items():
        assert models.gap(parameter.grad, counterpart.grad.view_as(parameter)) <= 1e-5, name

    with torch.no_grad():  # the negative control: one element of one adapter moved
        first = next(iter(pairs(ours, theirs).values()))[0]
        first.view(-1)[0] += 1
        assert models.gap(run_plain(ours, batch), expected) > 1e-4
        first.view(-1)[0] -= 1

    merge(ours)
    merged, reference = ours.state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == reference.keys()
    for name, tensor in merged.items():
        assert models.gap(tensor, reference[name]) <= 1e-5, name
    base = models.build(architecture).state_dict()
    assert all(models.gap(merged[f"{host}.weight"], base[f"{host}.weight"]) > 1e-2 for host in hosts)


@torch.no_grad()
def run_plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


class Formula(nn.Module):
    """W' written down as in the papers, for torch's parametrization of a dense weight `[out, in]` or `[in, out]`."""

    def __init__(self, adapter: nn.Module, transposed: bool) -> None:
        super().__init__()
        self.parts = nn.ParameterDict(dict(copy.deepcopy(adapter).named_parameters()))
        self.scaling, self.axis, self.transposed = adapter.scaling, getattr(adapter, "axis", None), transposed

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight.t() if self.transposed else weight
        direction = weight + self.scaling * self.parts["lora_B"] @ self.parts["lora_A"]
        if self.axis is not None:
            dim = 1 if self.axis == "output" else 0
            norm = direction.norm(dim=dim, keepdim=True).detach()
            direction = self.parts["magnitude"].unsqueeze(dim) * direction / norm
        return direction.t() if self.transposed else direction


def with_formula(model: nn.Module, adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Give a base model the weights W' of an adapted one by autograd; return its adapter parameters by our names."""
    parameters = {}
    model.requires_grad_(False)
    for path, _, adapter in iter_adapters(adapted):
        host = model.get_submodule(path)
        formula = Formula(adapter, transposed=type(host).__name__ == "Conv1D")
        parametrize.register_parametrization(host, "weight", formula)
        parameters |= {f"{path}.{name}": parameter for name, parameter in formula.parts.items()}
    return parameters


METHODS = {
    "lora": LoRA(r=RANK, alpha=ALPHA, target_modules="all-linear"),
    "dora": DoRA(r=RANK, alpha=ALPHA, target_modules="all-linear"),
    "dora-input": DoRA(r=RANK, alpha=ALPHA, target_modules="all-linear", magnitude_axis="input"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_equals_the_formula_in_float64(architecture, name):
    ours, reference = models.build(architecture).double(), models.build(architecture).double()
    batch = models.inputs(ours)
    attach(ours, METHODS[name])
    models.perturb(ours)
    expected_parameters = with_formula(reference, ours)
    (output, dx), (expected, expected_dx) = run(ours, batch), run(reference, batch)
    assert output.dtype is torch.float64
    assert models.gap(output, expected) <= 1e-10
    assert models.gap(dx, expected_dx) <= 1e-10
    for path, parameter, _ in iter_roles(ours):
        assert models.gap(parameter.grad, expected_parameters[path].grad) <= 1e-10, path
    merge(ours)
    for path, tensor in run_merged(reference).items():
        assert models.gap(read_weight(ours.get_submodule(path)), tensor) <= 1e-10, path
    assert models.gap(run_plain(ours, batch), expected) <= 1e-10


def run_merged(model: nn.Module) -> dict[str, Tensor]:
    """Return W' `[out, in]` of each parametrized module."""
    weights = {path: module.weight for path, module in model.named_modules() if parametrize.is_parametrized(module)}
    return {
        path: weight.t() if model.get_submodule(path).parametrizations.weight[0].transposed else weight
        for path, weight in weights.items()
    }


def test_the_two_axes_differ():
    outputs = []
    for axis in ("output", "input"):
        model = models.build("llama").double()
        attach(model, DoRA(r=RANK, alpha=ALPHA, target_modules=["q_proj", "v_proj"], magnitude_axis=axis))
        outputs.append(models.logits(models.perturb(model)))
    assert models.gap(*outputs) > 1e-2


@pytest.mark.parametrize(("scaling", "settings"), [("standard", {}), ("rslora", {"use_rslora": True})])
def test_scaling_equals_peft(scaling, settings):
    ours, theirs = models.build("bert"), models.build("bert")
    hosts = attach(ours, LoRA(r=RANK, alpha=6, scaling=scaling)).hosts
    theirs = with_peft(theirs, hosts, lora_alpha=6, **settings)
    copy_weights(models.perturb(ours), theirs)
    assert models.gap(models.logits(ours), models.logits(theirs, models.inputs(ours))) <= 1e-5


@pytest.mark.parametrize(("scaling", "factor"), [("standard", 1.5), ("rslora", 3.0), ("alpha", 6.0)])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_scaling_factor(scaling, factor, kind):
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, kind(r=4, alpha=6, scaling=scaling))
    ((_, host, adapter),) = iter_adapters(model)
    models.perturb(model)
    assert adapter.scaling == factor
    direction = host.weight + factor * adapter.lora_B @ adapter.lora_A
    if kind is DoRA:
        direction = adapter.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(3, 8)
    assert models.gap(model(x), linear(x, direction, host.bias)) <= 1e-5


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_patterns_equal_peft(kind):
    ours, theirs = models.build("bert"), models.build("bert")
    ranks, alphas = {"value": 2, r"layer\.1\..*key": 6}, {r"layer\.0\..*": 3.0}
    targets = ["query", "key", "value"]
    attach(ours, kind(r=RANK, alpha=ALPHA, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas))
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=targets,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_dora=kind is DoRA,
        ),
    )
    copy_weights(models.perturb(ours), theirs)
    assert {adapter.r for _, _, adapter in iter_adapters(ours)} == {2, 4, 6}
    assert len({adapter.scaling for _, _, adapter in iter_adapters(ours)}) == 5
    assert models.gap(models.logits(ours), models.logits(theirs, models.inputs(ours))) <= 1e-5


EMBEDDINGS = [("bert", "word_embeddings"), ("gpt2", "wte"), ("gemma3", "embed_tokens")]


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize(("architecture", "target"), EMBEDDINGS)
def test_embedding_equals_peft(architecture, target, kind):
    """BERT pads with a padding_idx; GPT-2's and Gemma's output layers are tied; Gemma scales its embeddings."""
    ours, theirs = models.build(architecture), models.build(architecture)
    batch, base = models.inputs(ours), models.logits(ours)
    (host,) = attach(ours, kind(r=RANK, alpha=ALPHA, target_modules=[target])).hosts
    theirs = with_peft(theirs, (host,), use_dora=kind is DoRA, fan_in_fan_out=False)
    copy_weights(models.perturb(ours), theirs)
    outputs = [models.logits(model, batch) for model in (ours, theirs)]
    assert models.gap(outputs[0], base) > 1e-2
    assert models.gap(*outputs) <= 1e-5
    for output in outputs:
        output.square().mean().backward()
    for name, (parameter, counterpart) in pairs(ours, theirs).items():
        assert models.gap(parameter.grad, counterpart.grad) <= 1e-5, name


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize(("architecture", "target"), EMBEDDINGS)
def test_merged_embedding_equals_adapted(architecture, target, kind):
    model = models.build(architecture)
    output_layer = model.get_output_embeddings()
    tied = output_layer is not None and output_layer.weight is model.get_input_embeddings().weight
    assert tied == (architecture != "bert")
    base = models.logits(model)
    attach(model, kind(r=RANK, alpha=ALPHA, target_modules=[target]))
    expected = models.logits(models.perturb(model)).detach()
    merge(model)
    assert models.gap(expected, base) > 1e-2
    assert models.gap(models.logits(model), expected) <= 1e-5
    if tied:
        assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
        assert model.config.tie_word_embeddings is False


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "1d-circular": (lambda: nn.Conv1d(6, 8, 3, padding=2, padding_mode="circular", bias=False), (2, 6, 11)),
    "1d-groups": (lambda: nn.Conv1d(6, 8, 3, groups=2), (2, 6, 11)),
    "2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 6, 9, 7)),
    "2d-same": (lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2, bias=False), (2, 6, 9, 7)),
    "2d-reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 7)),
    "2d-depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1), (2, 6, 9, 7)),
    "2d-unbatched": (lambda: nn.Conv2d(6, 8, 3), (6, 9, 7)),
}


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_the_formula(name, kind):
    build, shape = CONVOLUTIONS[name]
    model = nn.Sequential(build()).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = model(x)
    attach(model, kind(r=RANK, alpha=ALPHA, target_modules=["0"]))
    ((_, host, adapter),) = iter_adapters(model)
    assert models.gap(model(x), base) <= 1e-12
    models.perturb(model)
    parts = {name: parameter.detach().clone().requires_grad_() for name, parameter in adapter.named_parameters()}
    direction = host.weight.flatten(1) + adapter.scaling * parts["lora_B"] @ parts["lora_A"]
    if kind is DoRA:
        direction = parts["magnitude"][:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    expected = host._conv_forward(x, direction.view_as(host.weight), host.bias)
    output = model(x)
    assert models.gap(output, base) > 1e-2
    assert models.gap(output, expected) <= 1e-10
    gradients = torch.autograd.grad(output.square().sum(), [x, *adapter.parameters()])
    reference = torch.autograd.grad(expected.square().sum(), [x, *parts.values()])
    assert all(models.gap(*both) <= 1e-10 for both in zip(gradients, reference, strict=True))
    merge(model)
    assert models.gap(model(x), expected) <= 1e-10


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("name", ["1d", "2d"])
def test_convolution_equals_peft(name, kind):
    build, shape = CONVOLUTIONS[name]
    torch.manual_seed(4)
    ours = nn.Sequential(build())
    theirs = copy.deepcopy(ours)
    attach(ours, kind(r=RANK, alpha=ALPHA, target_modules=["0"]))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=kind is DoRA)
    theirs = peft.get_peft_model(theirs, config)
    copy_weights(models.perturb(ours), theirs)
    x = torch.randn(shape)
    outputs = [model(x) for model in (ours, theirs)]
    assert models.gap(*outputs) <= 1e-5
    for output in outputs:
        output.square().mean().backward()
    for parameter, counterpart in pairs(ours, theirs).values():
        assert models.gap(parameter.grad, counterpart.grad.view_as(parameter)) <= 1e-5
    merge(ours)
    assert models.gap(ours[0].weight, theirs.merge_and_unload()[0].weight) <= 1e-5


def test_dropout_reaches_the_convolution():
    model = nn.Sequential(nn.Conv1d(6, 8, 3))
    attach(model, LoRA(r=RANK, dropout=0.5, target_modules=["0"]))
    models.perturb(model)
    x = torch.randn(2, 6, 11)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
