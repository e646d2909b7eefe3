"""Selections of compiled models: one compilation of each, in threads and in asyncio tasks."""

import asyncio
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

from lora_lightning.adapters import Method, attach, disabled, iter_roles, selected
from lora_lightning.adapters.selection import compiling
from lora_lightning.methods import LoRA
from tests.adapters.toys import Bias
from tests.models import gap, perturb

# torch.compile itself makes an instance of each autograd function that has a setup_context.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

NUM_METHODS = 12
METHODS = [LoRA(r=1, target_modules=["layer.0"])]
METHODS += [Bias(target_modules=[f"layer.{number}"]) for number in range(1, NUM_METHODS)]  # which compile fast
FEW = METHODS[:3]


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(6, 6) for _ in range(NUM_METHODS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = x + layer(x)
        return x


@pytest.fixture
def model() -> nn.Module:
    model = Chain()
    attach(model, METHODS)
    return perturb(model)


X = torch.linspace(-1, 1, 12).view(2, 6)


@torch.no_grad()
def answers(called: nn.Module, model: nn.Module, methods: Sequence[Method] = METHODS) -> list[Tensor]:
    """Return what is computed under each method alone."""
    found = []
    for method in methods:
        with selected(model, [method]):
            found.append(called(X))
    return found


def test_twelve_selections_compile_once_each(model):
    expected = answers(model, model)
    assert min(gap(*pair) for pair in itertools.combinations(expected, 2)) > 1e-3
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        assert all(gap(*pair) <= 1e-6 for pair in zip(answers(compiled, model), expected, strict=True))
        assert counter.frame_count == NUM_METHODS
    with torch.no_grad():
        for _, parameter, _ in iter_roles(model):  # trained, or swapped for other adapters' values
            parameter.copy_(torch.randn_like(parameter))
    changed = answers(compiled, model)
    assert all(gap(*pair) <= 1e-6 for pair in zip(changed, answers(model, model), strict=True))
    assert min(map(gap, changed, expected)) > 1e-3
    assert counter.frame_count == NUM_METHODS


def test_without_room_for_them_selections_hit_the_limit(model, monkeypatch):
    monkeypatch.setattr(compiling, "_usual_limit", 8 - len(compiling._SEEN) - 2 * NUM_METHODS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=8), pytest.raises(FailOnRecompileLimitHit):
        answers(compiled, model)


def test_blocks_of_other_models_compile_nothing(model):
    other = Chain()
    attach(other, METHODS)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    expected = compiled(X)
    with disabled(other):
        assert torch.equal(compiled(X), expected)
    assert counter.frame_count == 1
    with disabled(model.layer[3]):
        assert gap(compiled(X), expected) > 1e-3
    assert counter.frame_count == 2


def test_compiled_in_threads(model):
    expected = answers(model, model, FEW)
    with torch.no_grad():
        whole = model(X)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    barrier = threading.Barrier(8, timeout=120)

    def run(number: int) -> bool:
        is_right = True
        for turn in range(10):
            which = (number + turn) % len(FEW)
            barrier.wait()
            with selected(compiled, [FEW[which]]), torch.no_grad():
                is_right &= gap(compiled(X), expected[which]) <= 1e-6
        with torch.no_grad():
            return is_right and gap(compiled(X), whole) <= 1e-6

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


@torch.no_grad()
def answers_of_tasks(compiled: nn.Module) -> list[Tensor]:
    """Return what is computed in tasks that enter their blocks before any of them computes, and in threads of tasks."""

    async def run(method: Method) -> list[Tensor]:
        with selected(compiled, [method]):
            await asyncio.sleep(0)
            first = compiled(X)
            return [first, await asyncio.to_thread(torch.no_grad()(compiled), X)]

    async def run_all() -> list[list[Tensor]]:
        return await asyncio.gather(*(run(method) for method in FEW))

    return list(itertools.chain.from_iterable(asyncio.run(run_all())))


def test_compiled_in_asyncio_tasks(model):
    expected = [answer for answer in answers(model, model, FEW) for _ in range(2)]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert all(gap(*pair) <= 1e-6 for pair in zip(answers_of_tasks(compiled), expected, strict=True))
    compiled._forward_pre_hooks.clear()
    gaps = list(map(gap, answers_of_tasks(compiled), expected))
    assert max(gaps[::2]) > 1e-3
    assert max(gaps[1::2]) > 1e-3


def test_a_compiled_model_inside_another_one(model):
    with torch.no_grad():
        expected = model(X)
        with disabled(model):
            base = model(X)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        outer = torch.compile(lambda x: compiled(x) + 1, fullgraph=True, backend="eager")
        assert gap(outer(X), expected + 1) <= 1e-6
        with disabled(model):
            assert gap(outer(X), base + 1) <= 1e-6


def test_layers_compiled_on_their_own_share_their_code(model):
    """Hosts of one attachment differ in nothing that compiled code is guarded by."""
    uniform = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)))
    attach(uniform, LoRA(r=1, target_modules="all-linear"))
    counter = CompileCounter()
    with torch.no_grad():
        perturb(uniform)
        expected = uniform(X)
        with disabled(uniform):
            base = uniform(X)
        for layer in uniform:
            layer.compile(fullgraph=True, backend=counter, dynamic=False)
        assert gap(uniform(X), expected) <= 1e-6
        assert counter.frame_count == 1
        with disabled(uniform):
            assert gap(uniform(X), base) <= 1e-6
    assert counter.frame_count == 2


def test_a_block_that_is_entered_before_anything_is_compiled(model):
    expected = answers(model, model, FEW)
    with selected(model, METHODS[:1]), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert gap(compiled(X), expected[0]) <= 1e-6
    with torch.no_grad():
        assert gap(compiled(X), expected[0]) > 1e-3
