"""What every method of the package must do, on a decoder and on an encoder.

A new method needs one entry in `EXAMPLES`; the tests find every concrete `Method` by themselves.
"""

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

import lora_lightning.methods
from lora_lightning.adapters import (
    Method,
    adapter_state_dict,
    detach,
    disabled,
    fold,
    iter_roles,
    load_adapter_state_dict,
)
from lora_lightning.adapters.weights import RESERVED, read_weight
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.errors import CheckpointError, NotMergeable
from lora_lightning.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRADrop,
    LoRAFA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TrainableTokens,
    VeRA,
)
from tests import distributed, models
from tests.host_memory import Store, offloading


@dataclass(frozen=True, kw_only=True)
class Example:
    """Settings of a method, and what it declares not to do.

    Args:
        method: The settings, without dropout: the tests that need it add it.
        models: Where it is defined.
        is_exact: The first forward is the base's to the last bit.
        is_mergeable: It folds into dense weights.
        merges_quantized: It folds into a 4-bit base too, since it changes no weight.
        changes_start: The first forward is not the base's: soft prompts are there from the start.
        on_plain: It works on plain torch modules, which have no architecture.
        spread: How far parameters must move, as a standard deviation, to show above the rounding of bfloat16.
        without_gradient: Regular expression of parameters whose gradient is zero by nature.
        compiles_folded: It compiles in one graph only once it is folded: torch breaks the graph at an LSTM.
    """

    method: Method
    models: tuple[str, ...] = ("llama", "bert")
    is_exact: bool = False
    is_mergeable: bool = True
    merges_quantized: bool = False
    changes_start: bool = False
    on_plain: bool = True
    spread: float = 0.1
    without_gradient: str | None = None
    compiles_folded: bool = False


# One or several settings of every method.
EXAMPLES: dict[type[Method], dict[str, Example]] = {
    LoRA: {
        "lora": Example(method=LoRA(r=4, alpha=8, target_modules="all-linear"), is_exact=True),
        "lora-pissa": Example(
            method=LoRA(r=4, alpha=8, target_modules="all-linear", init="pissa"), models=("llama",), on_plain=False
        ),
        "lora-olora": Example(
            method=LoRA(r=4, alpha=8, target_modules="all-linear", init="olora"), models=("llama",), on_plain=False
        ),
    },
    AdaLoRA: {
        "adalora": Example(method=AdaLoRA(target_r=3, init_r=4, alpha=32, target_modules="all-linear"), is_exact=True)
    },
    IA3: {"ia3": Example(method=IA3(), is_exact=True, on_plain=False, spread=0.5)},
    BottleneckAdapter: {
        f"bottleneck-{style}": Example(
            method=BottleneckAdapter(style=style, width=8),
            models=("llama",) if style == "pfeiffer" else ("llama", "bert"),  # `houlsby` without its attention part
            is_exact=True,
            is_mergeable=False,
            on_plain=False,
            spread=0.2,
        )
        for style in ("houlsby", "pfeiffer", "parallel")
    },
    BitFit: {
        "bitfit": Example(
            method=BitFit(),
            models=("bert", "gpt2"),
            is_exact=True,
            merges_quantized=True,
            without_gradient=r".*\.self\.key\.delta",  # a shift of all keys cancels in the softmax
        )
    },
    LoRADrop: {
        "lora-drop": Example(
            method=LoRADrop(r=4, alpha=8, target_modules="all-linear"), models=("bert",), is_exact=True
        )
    },
    DoRA: {
        "dora": Example(method=DoRA(r=4, alpha=8, target_modules="all-linear")),
        "dora-input": Example(method=DoRA(r=4, alpha=8, target_modules="all-linear", magnitude_axis="input")),
    },
    LoRAFA: {
        "lora_fa": Example(method=LoRAFA(r=4, alpha=8, target_modules="all-linear"), models=("llama",), is_exact=True),
    },
    DeltaLoRA: {
        "delta_lora": Example(
            method=DeltaLoRA(r=4, alpha=8, delta_ratio=0.5, start_step=0, target_modules="all-linear"),
            models=("llama",),
            is_exact=True,
        ),
    },
    VeRA: {
        "vera": Example(method=VeRA(r=16, d_initial=0.5, target_modules="all-linear"), is_exact=True),
        "vera-saved": Example(
            method=VeRA(r=16, d_initial=0.5, target_modules="all-linear", save_projection=True),
            models=("llama",),
            is_exact=True,
            on_plain=False,
        ),
    },
}
EXAMPLES[TrainableTokens] = {
    "trainable-tokens": Example(
        method=TrainableTokens(token_indices=list(range(3, 40))),
        is_exact=True,
        on_plain=False,
        merges_quantized=True,  # embeddings stay dense
    )
}
SOFT = {"is_mergeable": False, "changes_start": True, "on_plain": False}
EXAMPLES |= {
    PromptTuning: {"prompt-tuning": Example(method=PromptTuning(num_virtual_tokens=4), **SOFT)},
    PTuning: {
        "p-tuning": Example(method=PTuning(num_virtual_tokens=4), **SOFT),
        "p-tuning-lstm": Example(
            method=PTuning(num_virtual_tokens=4, encoder="lstm"), models=("bert",), compiles_folded=True, **SOFT
        ),
    },
    PrefixTuning: {"prefix-tuning": Example(method=PrefixTuning(num_virtual_tokens=4), **SOFT)},
    PTuningV2: {"p-tuning-v2": Example(method=PTuningV2(num_virtual_tokens=4), **SOFT)},
}
CASES = {
    f"{name}-{architecture}": (example, architecture)
    for examples in EXAMPLES.values()
    for name, example in examples.items()
    for architecture in example.models
}
ON_PLAIN = {
    name: example.method for examples in EXAMPLES.values() for name, example in examples.items() if example.on_plain
}


def concrete_methods() -> set[type[Method]]:
    """Return every concrete method of the package."""
    for module in pkgutil.walk_packages(lora_lightning.methods.__path__, "lora_lightning.methods."):
        importlib.import_module(module.name)

    def below(cls: type[Method]) -> Iterator[type[Method]]:
        for subclass in cls.__subclasses__():
            yield subclass
            yield from below(subclass)

    concrete = {cls for cls in below(Method) if not inspect.isabstract(cls)}
    public = {cls for cls in concrete if not cls.__name__.startswith("_")}  # the ends of `compare` are no methods
    return {cls for cls in public if cls.__module__.startswith("lora_lightning.")}


def test_every_method_has_an_example():
    assert concrete_methods() >= {LoRA, DoRA}
    without = {cls.__name__ for cls in concrete_methods()} - {cls.__name__ for cls in EXAMPLES}
    assert not without, f"add settings of {without} to EXAMPLES, so that they are held to the contract"


@pytest.fixture(params=CASES)
def case(request) -> tuple[Example, str]:
    return CASES[request.param]


@pytest.fixture
def example(case) -> Example:
    return case[0]


@pytest.fixture
def architecture(case) -> str:
    return case[1]


@pytest.fixture
def method(example) -> Method:
    return example.method


@pytest.fixture
def base(architecture) -> nn.Module:
    return models.build(architecture)


def adapted(model: nn.Module, method: Method) -> nn.Module:
    """Return the model with perturbed adapters: nothing is zero, so every part shows in the output."""
    attach(model, method)
    return models.perturb(model)


def with_dropout(method: Method) -> Method:
    """Return the same method with dropout, where it has any."""
    return dataclasses.replace(method, dropout=0.25) if takes_dropout(method) else method


def takes_dropout(method: Method) -> bool:
    """Tell whether a method has dropout; Delta-LoRA has the setting and refuses it."""
    return hasattr(method, "dropout") and not isinstance(method, DeltaLoRA)


def step(model: nn.Module, compiled: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the adapter gradients of one backward pass, through a compiled form of the model if given."""
    model.zero_grad()
    models.logits(model if compiled is None else compiled, models.inputs(model)).float().square().mean().backward()
    return {name: parameter.grad for name, parameter, _ in iter_roles(model) if parameter.requires_grad}


def has_no_gradient(name: str, example: Example) -> bool:
    """Tell whether the gradient of the parameter called `name` is zero by nature, so nothing but rounding."""
    return example.without_gradient is not None and re.fullmatch(example.without_gradient, name) is not None


def largest_gap(actual: dict[str, Tensor], reference: dict[str, Tensor], example: Example) -> float:
    """Return the largest gap between gradients, without those that are zero by nature."""
    names = [name for name in reference if not has_no_gradient(name, example)]
    return max(models.gap(actual[name], reference[name]) for name in names)


def quantize(model: nn.Module) -> nn.Module:
    """Store every linear layer but the head in 4 bits: nf4, double quantization."""
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path in ("lm_head", "classifier"):
            continue
        packed = Linear4bit(module.in_features, module.out_features, module.bias is not None, torch.float32)
        packed.weight = Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
        packed.bias = module.bias
        # Some CPUs repack the weight in the first evaluation, after which bitsandbytes can neither train nor read it;
        # whoever loads a 4-bit model for training turns that off.
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(path, packed.to("cpu"))
    return model.eval()


def dequantized(model: nn.Module) -> nn.Module:
    """Return a copy of a 4-bit model with the same weights stored dense."""
    dense = copy.deepcopy(model)
    for path, module in list(dense.named_modules()):
        if isinstance(module, Linear4bit):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data = read_weight(module).float()
            linear.bias = module.bias
            dense.set_submodule(path, linear)
    return dense.eval()


def test_first_forward_equals_the_base(base, method, example):
    before = models.logits(base)
    attach(base, method)
    after = models.logits(base)
    assert after.shape == before.shape
    if example.is_exact:
        assert torch.equal(after, before)
    assert (models.gap(after, before) <= 1e-6) != example.changes_start
    assert models.gap(models.logits(models.perturb(base)), before) > 1e-3


def test_adapters_alone_get_gradients(base, method, example):
    names = {name for name, _ in base.named_parameters()}
    adapted(base, method)
    grads = step(base)
    assert grads
    for name, grad in grads.items():
        by_nature = has_no_gradient(name, example)
        assert grad is not None
        assert (grad.abs().max() <= 1e-6) if by_nature else (grad.abs().max() > 1e-7), name
    for name, parameter in base.named_parameters():
        assert (name in names) == (parameter.grad is None)
        assert (name in names) != parameter.requires_grad


def test_state_round_trip(architecture, method):
    first = adapted(models.build(architecture), method)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(first).items()}
    torch.manual_seed(99)
    second = models.build(architecture)
    attach(second, method)
    assert models.gap(models.logits(second), models.logits(first)) > 1e-3
    load_adapter_state_dict(second, state)
    assert torch.equal(models.logits(second), models.logits(first))
    assert adapter_state_dict(second).keys() == state.keys()
    with pytest.raises(CheckpointError):
        load_adapter_state_dict(second, dict(list(state.items())[1:]))


def test_merged_equals_adapted(base, method, example):
    keys, kinds = base.state_dict().keys(), {path: type(module) for path, module in base.named_modules()}
    with torch.no_grad():
        before = models.logits(base)
        expected = models.logits(adapted(base, method))
        if not example.is_mergeable:
            with pytest.raises(NotMergeable):
                merge(base)
            assert torch.equal(models.logits(base), expected)
            return
        merge(base)
        assert models.gap(models.logits(base), expected) <= 1e-5
        assert models.gap(models.logits(base), before) > 1e-3
    assert base.state_dict().keys() == keys
    assert {path: type(module) for path, module in base.named_modules()} == kinds


def test_disabled_gives_the_base(base, method):
    before = models.logits(base)
    adapted(base, method)
    with disabled(base):
        assert torch.equal(models.logits(base), before)
    assert models.gap(models.logits(base), before) > 1e-3


def snapshot(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Return what `attach` may touch of each module."""
    return {
        path: (
            type(module),
            sorted(module.__dict__.keys()),
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            dict(module._forward_hooks_with_kwargs),
            dict(module._forward_pre_hooks_with_kwargs),
            [(name, id(parameter), parameter.requires_grad) for name, parameter in module.named_parameters()],
            [(name, id(tensor)) for name, tensor in module.named_buffers()],
        )
        for path, module in model.named_modules()
    }


def test_detach_restores_everything(base, method):
    next(base.parameters()).requires_grad_(False)
    before, keys, output = snapshot(base), list(base.state_dict()), models.logits(base)
    adapted(base, method)
    assert snapshot(base) != before
    detach(base)
    assert snapshot(base) == before
    assert list(base.state_dict()) == keys
    assert torch.equal(models.logits(base), output)


def test_base_names_are_kept(base, method):
    before = base.state_dict()
    adapted(base, method)
    after = {name: tensor for name, tensor in base.state_dict().items() if RESERVED not in name.split(".")}
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies_are_independent(base, method, clone):
    adapted(base, method)
    expected = models.logits(base).detach()
    other = clone(base)
    assert torch.equal(models.logits(other), expected)
    models.perturb(other, seed=3)
    assert models.gap(models.logits(other), expected) > 1e-3
    assert torch.equal(models.logits(base), expected)
    assert step(other).keys() == step(base).keys()
    detach(other)
    assert not any(RESERVED in name for name in other.state_dict())


# torch.compile itself makes an instance of each autograd function that has a setup_context.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph(architecture, base, method, example):
    if architecture == "llama":  # with dropout; the other architecture goes without
        method = with_dropout(method)
    adapted(base, method).train()
    if example.compiles_folded:
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
            step(base, torch.compile(base, fullgraph=True, backend="aot_eager"))
        fold(base)
    torch.manual_seed(5)
    expected = step(base)
    torch.compiler.reset()
    torch.manual_seed(5)
    actual = step(base, torch.compile(base, fullgraph=True, backend="aot_eager"))
    assert largest_gap(actual, expected, example) <= 1e-5


# torch.compile itself makes an instance of each autograd function that has a setup_context.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # its own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler backend needs a C++ compiler")
@pytest.mark.parametrize("method", ON_PLAIN.values(), ids=list(ON_PLAIN))
def test_default_compiler_backend(method):
    """What the backend fuses must still be right, so small layers on which every fusion applies are enough."""
    model = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8, bias=False))
    adapted(model, with_dropout(method)).train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, options={"fallback_random": True})
    x = torch.randn(6, 24, requires_grad=True)
    results = []
    for called in (model, compiled):
        torch.manual_seed(5)
        output = called(x)
        wanted = [x, *(parameter for _, parameter, _ in iter_roles(model))]
        results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    assert all(models.gap(*both) <= 1e-5 for both in zip(*results, strict=True))


def test_four_bit_base(base, method, example):
    quantize(base)
    dense = dequantized(base)
    expected = models.logits(base)
    attach(base, method)
    assert (models.gap(models.logits(base), expected) <= 1e-5) != example.changes_start
    attach(dense, method)
    load_adapter_state_dict(dense, adapter_state_dict(models.perturb(base)))
    assert models.gap(models.logits(base), expected) > 1e-3
    assert models.gap(models.logits(base), models.logits(dense)) <= 1e-5
    actual, reference = step(base), step(dense)
    assert largest_gap(actual, reference, example) <= 1e-4
    output = models.logits(base)
    if example.merges_quantized:
        merge(base)
        assert models.gap(models.logits(base), output) <= 1e-5
        return
    with pytest.raises(NotMergeable, match="quantized" if example.is_mergeable else None):
        merge(base)
    assert torch.equal(models.logits(base), output)


def test_four_bit_base_in_evaluation_and_back(base, method, example):
    adapted(quantize(base), method).train()
    expected, grads = models.logits(base), step(base)
    with torch.no_grad():
        assert models.gap(models.logits(base.eval()), expected) <= 1e-5
    after = step(base.train())
    assert largest_gap(after, grads, example) <= 1e-6


def test_bfloat16_base_under_float32_adapters(base, method, example):
    base.bfloat16()
    before = models.logits(base)
    attach(base, method)
    assert {parameter.dtype for _, parameter, _ in iter_roles(base)} == {torch.float32}
    after = models.logits(base)
    assert after.dtype is torch.bfloat16
    assert (models.gap(after, before) <= 2e-2) != example.changes_start
    wide = copy.deepcopy(models.perturb(base, std=example.spread)).float()
    assert models.gap(models.logits(base), before) > 0.1
    assert models.gap(models.logits(base), models.logits(wide)) <= 5e-2
    assert_same_directions(step(base), step(wide), example)


def assert_same_directions(actual: dict[str, Tensor], reference: dict[str, Tensor], example: Example) -> None:
    """Compare float32 gradients that were computed in bfloat16 with exact ones."""
    for name, grad in actual.items():
        assert grad.dtype is torch.float32
        if has_no_gradient(name, example):
            continue
        assert torch.cosine_similarity(grad.flatten(), reference[name].flatten(), dim=0) > 0.97, name


def test_autocast(base, method, example):
    adapted(base, method)
    reference, expected = step(base), models.logits(base)
    base.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = models.logits(base)
        loss = output.float().square().mean()
    loss.backward()
    assert output.dtype is torch.bfloat16
    assert 1e-5 < models.gap(output, expected) <= 5e-2
    grads = {name: parameter.grad for name, parameter, _ in iter_roles(base) if parameter.requires_grad}
    assert_same_directions(grads, reference, example)


def test_meta_device(base, method):
    hollow = copy.deepcopy(base).to("meta")
    hollow.tie_weights()  # moving them to the meta device unties them
    hollow.config.pad_token_id = None  # else GPT-2 looks for padding in the ids, which have no values
    report = attach(hollow, method)
    assert all(parameter.is_meta for _, parameter, _ in iter_roles(hollow))
    ids = {name: tensor.to("meta") for name, tensor in models.inputs(base).items()}
    assert models.logits(hollow, {"input_ids": ids["input_ids"]}).is_meta
    base_buffers = dict(base.named_buffers())
    assert attach(base, method) == report
    models.perturb(base)
    hollow.to_empty(device="cpu")
    hollow.load_state_dict(base.state_dict())
    for name, buffer in hollow.named_buffers():
        if name in base_buffers:
            buffer.copy_(base_buffers[name])
    assert models.gap(models.logits(hollow), models.logits(base)) <= 1e-6


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(base, method, example, use_reentrant):
    adapted(base, with_dropout(method)).train()
    torch.manual_seed(5)
    expected = step(base)
    base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    actual = step(base)
    assert largest_gap(actual, expected, example) <= 1e-6
    if takes_dropout(method):
        torch.manual_seed(6)
        other = step(base)
        assert largest_gap(other, expected, example) > 1e-3


def test_offloaded_activations(base, method, example):
    adapted(base, with_dropout(method)).train()
    torch.manual_seed(5)
    expected = step(base)
    store = Store()
    for damage in (0, 1):
        store.damage = damage
        torch.manual_seed(5)
        with offloading(base, store, min_bytes=1024):
            actual = step(base)
        assert sum(copied.num_restored for copied in store.copies) > 5
        assert (largest_gap(actual, expected, example) > 0) == bool(damage)


DDP_CASES = {name: (architecture, example.method) for name, (example, architecture) in CASES.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, list[dict[str, Tensor]]]:
    """Run every case in the same two processes: starting them is what takes time."""
    by_rank = distributed.run(list(DDP_CASES.values()), tmp_path_factory.mktemp("ddp"))
    return {case: [results[index] for results in by_rank] for index, case in enumerate(DDP_CASES)}


@pytest.mark.parametrize("name", DDP_CASES)
def test_two_processes_equal_one(two_processes, name):
    first, second = two_processes[name]
    expected = distributed.gradients(DDP_CASES[name], rank=None)
    alone = distributed.gradients(DDP_CASES[name], rank=None, rows=2)
    assert expected.keys() == first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in expected)
    together = [torch.cat([grads[name].flatten() for name in expected]) for grads in (first, expected, alone)]
    assert models.gap(together[0], together[1]) <= 1e-12
    assert models.gap(together[2], together[1]) > 1e-2
