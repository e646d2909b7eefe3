"""Names that act: in threads at the same time, in a thread started inside a block, compiled, and between passes."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lora_lightning.adapters import active, bind, disabled, iter_roles, set_active
from lora_lightning.backbones.attach import attach
from lora_lightning.methods import DoRA, LoRA
from tests import models
from tests.models import gap, perturb

# torch.compile itself makes an instance of each autograd function that has a setup_context.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

NUM_NAMES = 12
NAMES = [f"adapter-{number}" for number in range(NUM_NAMES)]
X = torch.linspace(-1, 1, 12).view(2, 6)


def method_of(number: int) -> LoRA:
    """Return a method that differs from the next number's in its rank or its kind."""
    return DoRA(r=2) if number % 3 == 2 else LoRA(r=1 + number % 3)


def adapted(model: nn.Module, num_names: int = NUM_NAMES) -> nn.Module:
    for number in range(num_names):
        attach(model, method_of(number), name=NAMES[number])
    return perturb(model, std=0.3)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return adapted(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))


@pytest.fixture
def llama() -> nn.Module:
    return adapted(models.build("llama"), num_names=3)


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Let threads take turns often, so that they meet inside blocks."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@torch.no_grad()
def answers(called: nn.Module, model: nn.Module) -> list[Tensor]:
    """Return what is computed under each name; no two are equal."""
    found = []
    for name in NAMES:
        with active(model, name):
            found.append(called(X))
    assert min(gap(*pair) for pair in itertools.combinations(found, 2)) > 1e-3
    return found


def num_wrong_calls(answer: Callable[[int], Tensor], expected: list[Tensor]) -> int:
    """Return how many of 8 x 1,000 calls were wrong: each of 8 threads calls under its own name."""
    barrier = threading.Barrier(8, timeout=120)

    @torch.no_grad()
    def run(number: int) -> int:
        barrier.wait()
        return sum(not torch.equal(answer(number), expected[number]) for _ in range(1000))

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(run, range(8)))


@pytest.mark.usefixtures("quick_switches")
def test_eight_threads_with_adapters_of_their_own(model):
    expected = answers(model, model)

    def answer(number: int) -> Tensor:
        with active(model, NAMES[number]):
            return model(X)

    assert num_wrong_calls(answer, expected) == 0


@pytest.mark.usefixtures("quick_switches")
def test_for_good_is_for_all_threads(model):
    """Control: `set_active` is seen by other threads, so threads that each choose by it disturb each other."""
    expected = answers(model, model)

    def answer(number: int) -> Tensor:
        set_active(model, NAMES[number])
        return model(X)

    assert num_wrong_calls(answer, expected) > 0


class Streamer:
    """Collects what `generate` hands on, as transformers' streamers do."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def stream(model: nn.Module, generate: Callable[..., Tensor]) -> list[int]:
    """Generate in a thread, and return what its streamer got."""
    streamer = Streamer()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = models.inputs(model)["input_ids"][:1]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "streamer": streamer, **settings}
    thread = threading.Thread(target=generate, kwargs=given)
    thread.start()
    thread.join()
    return streamer.tokens


def test_a_streamer_in_a_thread_that_is_started_inside_a_block(llama):
    found = {}
    for name in NAMES[:3]:
        with active(llama, name):
            found[name] = stream(llama, bind(llama.generate))
        set_active(llama, name)
        assert stream(llama, llama.generate) == found[name]
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    set_active(llama, NAMES[0])
    with active(llama, NAMES[1]):
        bound = bind(llama.generate)
        assert stream(llama, llama.generate) == found[NAMES[0]]  # a thread begins without a selection
    set_active(llama, NAMES[2])
    assert stream(llama, bound) == found[NAMES[1]]  # after the block too


def test_bound_outside_of_blocks_keeps_what_acted(llama):
    set_active(llama, NAMES[1])
    expected = stream(llama, llama.generate)
    bound = bind(llama.generate)
    set_active(llama, NAMES[2])
    assert stream(llama, bound) == expected
    assert stream(llama, llama.generate) != expected


def test_twelve_names_compile_once_each(model):
    expected = answers(model, model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        assert all(gap(*pair) <= 1e-6 for pair in zip(answers(compiled, model), expected, strict=True))
        assert counter.frame_count == NUM_NAMES


def test_twelve_names_that_act_for_good_compile_once_each(model):
    expected = answers(model, model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        for name, own in zip(NAMES, expected, strict=True):
            set_active(model, name)
            with torch.no_grad():
                assert gap(compiled(X), own) <= 1e-6
        assert counter.frame_count == NUM_NAMES


def step(model: nn.Module, between: Callable[[], None]) -> dict[str, Tensor]:
    """Return the adapter gradients of a step, with something done between its passes."""
    model.zero_grad()
    loss = models.logits(model, models.inputs(model)).square().mean()
    between()
    loss.backward()
    return {name: parameter.grad for name, parameter, _ in iter_roles(model) if parameter.grad is not None}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(gap(actual[name], expected[name]) <= 1e-6 for name in expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_others_may_act_for_good_before_a_checkpoint_is_computed_again(llama, use_reentrant):
    """Backward follows its forward pass, whatever acts when it runs."""
    llama.train()
    set_active(llama, NAMES[0])
    expected = step(llama, between=lambda: None)
    llama.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for later in (NAMES[1], None, NAMES[2], NAMES[:2]):
        set_active(llama, NAMES[0])
        assert same(step(llama, between=partial(set_active, llama, later)), expected)
    set_active(llama, NAMES[1])
    other = step(llama, between=lambda: set_active(llama, NAMES[0]))
    assert other
    assert not same(other, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_block_around_forward_is_what_backward_follows(llama, use_reentrant):
    llama.train()
    set_active(llama, NAMES[1])
    expected = step(llama, between=lambda: None)
    llama.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    set_active(llama, NAMES[0])
    llama.zero_grad()
    with active(llama, NAMES[1]):
        loss = models.logits(llama, models.inputs(llama)).square().mean()
    set_active(llama, NAMES[2])
    with disabled(llama):
        loss.backward()
    actual = {name: parameter.grad for name, parameter, _ in iter_roles(llama) if parameter.grad is not None}
    assert same(actual, expected)
