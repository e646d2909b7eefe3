"""Rows of a batch with adapters of their own: compiled once for each set of names, in threads, after checkpoints."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lora_lightning.adapters import active, attach, bind, disabled, iter_roles, per_row, set_active
from lora_lightning.errors import ConfigError
from lora_lightning.methods import DoRA, LoRA
from tests.models import gap, perturb

# torch.compile itself makes an instance of each autograd function that has a setup_context.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

METHODS = {"de": LoRA(r=2), "fr": DoRA(r=2), "it": LoRA(r=3), "es": DoRA(r=2, magnitude_axis="input")}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    for name, method in METHODS.items():
        attach(model, method, name=name)
    return perturb(model, std=0.5)


def batch(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(num_rows))


@torch.no_grad()
def one_by_one(model: nn.Module, rows: list[str | None], x: Tensor) -> Tensor:
    """Return what each row answers in a block of its own."""
    answers = []
    for name, row in zip(rows, x, strict=True):
        with active(model, name):
            answers.append(model(row[None]))
    return torch.cat(answers)


SAME_NAMES = [
    ["de", "fr", "fr", "de"],
    ["fr", "de", "de", "de"],
    ["de", "fr", "de", "fr"],
    ["de", "de", "de", "fr"],  # one row of its name
    ["fr", "fr", "de", "fr"],
]


def test_rows_compile_once_for_each_set_of_names(model):
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    x = batch(4)
    with torch.no_grad():
        for rows in SAME_NAMES:
            with per_row(model, rows):
                assert gap(compiled(x), one_by_one(model, rows, x)) <= 1e-6
            assert counter.frame_count == 1
        with per_row(model, ["de", "it", "de", "it"]):
            assert gap(compiled(x), one_by_one(model, ["de", "it", "de", "it"], x)) <= 1e-6
        assert counter.frame_count == 2


def test_one_row_at_first_compiles_once_too(model):
    """A group of one row compiles no code for one row alone."""
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    x = batch(4)
    with torch.no_grad():
        for rows in reversed(SAME_NAMES):
            with per_row(model, rows):
                assert gap(compiled(x), one_by_one(model, rows, x)) <= 1e-6
    assert counter.frame_count == 1


def test_values_are_swapped_under_a_compiled_mixture(model):
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    x, rows = batch(4), SAME_NAMES[0]
    with torch.no_grad(), per_row(model, rows):
        before = compiled(x)
        for _, parameter, _ in iter_roles(model, "fr"):
            parameter.copy_(torch.randn_like(parameter))
        after = compiled(x)
    assert torch.equal(after[0], before[0])
    assert gap(after[1], before[1]) > 1e-3
    assert gap(after, one_by_one(model, rows, x)) <= 1e-6
    assert counter.frame_count == 1


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_gradients_of_a_compiled_mixture(model, num_rows):
    rows = [*itertools.islice(itertools.cycle(["fr", None, "de", "es"]), num_rows)]
    x = batch(num_rows)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    found = []
    for called in (model, compiled):
        model.zero_grad()
        with per_row(model, rows):
            called(x).square().sum().backward()
        found.append([parameter.grad for _, parameter, _ in iter_roles(model) if parameter.grad is not None])
    expected, actual = found
    assert all(gap(*both) <= 1e-6 for both in zip(actual, expected, strict=True))
    assert max(gradient.abs().max() for gradient in expected) > 1e-3


def test_threads_with_rows_of_their_own(model):
    x = batch(6)
    names = ["de", "fr", "it", None]
    mixtures = [[names[(row + shift) % 4] for row in range(6)] for shift in range(4)]
    expected = [one_by_one(model, rows, x) for rows in mixtures]
    assert min(gap(*pair) for pair in itertools.combinations(expected, 2)) > 1e-3
    barrier = threading.Barrier(4, timeout=120)

    @torch.no_grad()
    def run(number: int) -> bool:
        is_right = True
        for turn in range(100):
            which = (number + turn) % 4
            barrier.wait()
            with per_row(model, mixtures[which]):
                is_right &= gap(model(x), expected[which]) <= 1e-6
        return is_right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_a_bound_function_keeps_its_rows(model):
    x, rows = batch(3), ["fr", "de", None]
    expected = one_by_one(model, rows, x)
    with torch.no_grad(), per_row(model, rows):
        bound = bind(torch.no_grad()(model))
    answers = {}
    threads = [
        threading.Thread(target=lambda: answers.update(bound=bound(x))),
        threading.Thread(target=lambda: answers.update(free=torch.no_grad()(model)(x))),
    ]
    for thread in threads:
        thread.start()
        thread.join()
    assert gap(answers["bound"], expected) <= 1e-6
    assert gap(answers["free"], expected) > 1e-3


def test_blocks_inside_a_mixture_decide_and_leave_it(model):
    x, rows = batch(3), ["fr", "de", None]
    expected = one_by_one(model, rows, x)
    with torch.no_grad(), per_row(model, rows):
        with disabled(model):
            base = model(x)
        with active(model, "it"):
            assert gap(model(x), one_by_one(model, ["it"] * 3, x)) <= 1e-6
        set_active(model, "it")  # which acts outside of blocks
        assert gap(model(x), expected) <= 1e-6
    assert gap(base, one_by_one(model, [None] * 3, x)) <= 1e-6
    assert gap(base, expected) > 1e-3


@pytest.mark.parametrize("rows", [[], "de", ["de", "xx"]])
def test_names_are_checked(model, rows):
    with pytest.raises(ConfigError), per_row(model, rows):
        pass


def test_as_many_names_as_rows(model):
    with per_row(model, ["de", "fr"]), pytest.raises(ConfigError, match="was given 2 names, and '0' is called with 3"):
        model(batch(3))
