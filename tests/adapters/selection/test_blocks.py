"""Which adapters act: in overlapping blocks, threads, asyncio tasks, copies and parts of a model."""

import asyncio
import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import attach, bind, detach, disabled, iter_acting, selected
from lora_lightning.adapters.selection import state
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import ConfigError
from lora_lightning.methods import LoRA
from tests.adapters.toys import Bias, Model, Scale, ids
from tests.models import gap, perturb

QUERIES, BIASES = LoRA(r=2, target_modules=["query"], modules_to_save=["out"]), Bias(target_modules=["dense"])
VALUES, SCALES = LoRA(r=2, target_modules=["value"]), Scale(target_modules=["dense"])
METHODS = [QUERIES, BIASES, VALUES, SCALES]

Block = Callable[[], AbstractContextManager[None]]


def adapted() -> nn.Module:
    model = Model()
    attach(model, METHODS)
    return perturb(model).eval()


@pytest.fixture
def model() -> nn.Module:
    return adapted()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    return model(ids())


def blocks(model: nn.Module) -> list[Block]:
    """Return eight blocks in which the model answers differently."""
    return [
        nullcontext,
        lambda: disabled(model),
        lambda: disabled(model.layer[0]),
        *(lambda method=method: selected(model, [method]) for method in METHODS),
        lambda: selected(model, METHODS[:2]),
    ]


def answers_of(model: nn.Module) -> list[Tensor]:
    """Return what the model answers in each block alone; no two are equal."""
    answers = []
    for block in blocks(model):
        with block():
            answers.append(answer(model))
    assert min(gap(*pair) for pair in itertools.combinations(answers, 2)) > 1e-3
    return answers


class Shared:
    """A state that all threads and tasks share, as a flag on a module would be."""

    def __init__(self) -> None:
        self.state = state._EMPTY

    def get(self) -> state._State:
        return self.state

    def set(self, state: state._State) -> None:
        self.state = state


# Blocks


def test_the_selected_methods_act_alone(model):
    """Compared with a model that has the adapters of this method and no others."""
    alone = Model()
    attach(alone, [BIASES, LoRA(r=1, target_modules=["embed"], modules_to_save=["out"])])
    own = {name: tensor for name, tensor in model.state_dict().items() if name in alone.state_dict()}
    alone.load_state_dict(own, strict=False)  # LoRA on the embedding starts at zero and stays there
    with selected(model, [BIASES]):
        assert [path for path, _, _ in iter_acting(model)] == ["head.dense", "head.out"]
        assert torch.equal(answer(model), answer(alone))
    assert gap(answer(model), answer(alone)) > 1e-3
    with pytest.raises(ConfigError, match="was not attached to the model"), selected(model, [LoRA(r=3)]):
        pass


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_blocks_are_left_in_any_order(model, order):
    whole, off, _, queries, *_ = answers_of(model)
    entered = [(disabled(model), off), (selected(model, [QUERIES]), queries), (selected(model, METHODS), whole)]
    for block, expected in entered:
        block.__enter__()
        assert torch.equal(answer(model), expected)
    still_open = dict(enumerate(entered))
    for number in order:
        still_open.pop(number)[0].__exit__(None, None, None)
        expected = list(still_open.values())[-1][1] if still_open else whole
        assert torch.equal(answer(model), expected)


def test_blocks_of_parts_add_up(model):
    whole, off, part, *_ = answers_of(model)
    with disabled(model.layer[0]), disabled(model.layer[1]), disabled(model.head):
        assert torch.equal(answer(model), off)
    with disabled(model), selected(model.layer[0], [QUERIES, VALUES]):
        assert {path.rpartition(".")[0] for path, _, _ in iter_acting(model)} == {"layer.0"}
    outer = disabled(model.layer[0])
    outer.__enter__()
    with selected(model, METHODS):
        assert torch.equal(answer(model), whole)
    assert torch.equal(answer(model), part)
    outer.__exit__(None, None, None)
    assert torch.equal(answer(model), whole)


def test_several_attachments_in_one_model():
    model, method = nn.ModuleList([Model(), Model()]), LoRA(r=2, target_modules=["query"])
    for part in model:
        attach(part, method)
        perturb(part)
    adapted_outputs = [answer(part) for part in model]
    with disabled(model[0]):
        assert gap(answer(model[0]), adapted_outputs[0]) > 1e-3
        assert torch.equal(answer(model[1]), adapted_outputs[1])
    with disabled(model):
        assert not list(iter_acting(model))
        bases = [answer(part) for part in model]
    detach(model)
    assert all(map(torch.equal, bases, [answer(part) for part in model]))


def test_adapters_are_taken_off_and_others_attached_inside_a_block(model):
    with disabled(model):
        detach(model)
        base = answer(model)
        attach(model, METHODS)
        assert gap(answer(perturb(model)), base) > 1e-3
    assert gap(answer(model), base) > 1e-3


# Threads


def answer_together(model: nn.Module) -> list[Tensor]:
    """Answer in a thread for each block, each of them inside its own block while the others are in theirs."""
    barrier = threading.Barrier(len(blocks(model)), timeout=60)

    def run(block: Block) -> Tensor:
        barrier.wait()
        with block():
            barrier.wait()
            first = answer(model)
            barrier.wait()
        return first

    with ThreadPoolExecutor(len(blocks(model))) as pool:
        return list(pool.map(run, blocks(model)))


def test_each_of_eight_threads_has_its_own_selection(model, monkeypatch):
    expected = answers_of(model)
    for _ in range(20):
        assert all(map(torch.equal, answer_together(model), expected))
    monkeypatch.setattr(state, "_STATE", Shared())
    assert not all(map(torch.equal, answer_together(model), expected))


def test_threads_that_enter_and_leave_at_any_time(model):
    expected = answers_of(model)

    def run(number: int) -> bool:
        is_right = True
        for turn in range(100):
            which = (number + turn) % len(expected)
            with blocks(model)[which]():
                is_right &= torch.equal(answer(model), expected[which])
        return is_right and torch.equal(answer(model), expected[0])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))
    assert torch.equal(answer(model), expected[0])


def in_a_thread(function: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_takes_a_bound_function_along(model):
    adapted_output, base, *_ = answers_of(model)

    def here() -> Tensor:
        return answer(model)

    with disabled(model):
        assert torch.equal(in_a_thread(here), adapted_output)
        bound = bind(here)
        assert bound.__name__ == "here"
        assert torch.equal(in_a_thread(bound), base)
        whole = bind(model)
    assert torch.equal(in_a_thread(bound), base)
    assert torch.equal(bound(), base)
    assert torch.equal(whole(ids()), base)
    assert torch.equal(here(), adapted_output)
    with disabled(model):
        assert torch.equal(bind(bound)(), base)
        with selected(model, METHODS):
            assert torch.equal(bound(), base)
            assert torch.equal(here(), adapted_output)


def test_a_bound_function_may_have_blocks_of_its_own_and_fail(model):
    adapted_output, base, *_ = answers_of(model)

    def switch_on_and_fail() -> None:
        with selected(model, METHODS):
            assert torch.equal(answer(model), adapted_output)
        assert torch.equal(answer(model), base)
        raise KeyError

    with disabled(model):
        bound = bind(switch_on_and_fail)
    with pytest.raises(KeyError):
        bound()
    assert torch.equal(answer(model), adapted_output)


def test_generator_functions_are_not_bound():
    def numbers():
        yield 1

    async def later():
        yield 1

    for function in (numbers, later):
        with pytest.raises(ConfigError, match="bind the function that iterates"):
            bind(function)


def test_a_block_is_left_where_it_was_entered(model):
    adapted_output, base, *_ = answers_of(model)
    block = disabled(model)
    block.__enter__()
    failures: list[BaseException] = []

    def leave() -> None:
        try:
            block.__exit__(None, None, None)
        except ConfigError as error:
            failures.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert "left in another thread" in str(failures[0])
    assert torch.equal(answer(model), base)
    state._activate(state._EMPTY)
    assert torch.equal(answer(model), adapted_output)


def test_the_default_holds_in_all_threads_and_blocks_go_before_it(model):
    adapted_output, base, *_ = answers_of(model)
    selector = next(iter(iter_acting(model)))[1]._modules[RESERVED].selector
    selector.default = state.NONE
    assert torch.equal(answer(model), base)
    assert torch.equal(in_a_thread(lambda: answer(model)), base)
    with selected(model, METHODS):
        assert torch.equal(answer(model), adapted_output)
    assert torch.equal(answer(copy.deepcopy(model)), base)
    selector.default = state.ALL
    assert torch.equal(answer(model), adapted_output)


# asyncio


async def answer_in_tasks(model: nn.Module) -> list[Tensor]:
    """Answer in a task for each block, all of which are entered before the first answer."""
    num_inside, all_inside = 0, asyncio.Event()

    async def run(block: Block) -> Tensor:
        nonlocal num_inside
        with block():
            num_inside += 1
            if num_inside == len(blocks(model)):
                all_inside.set()
            await all_inside.wait()
            return answer(model)

    return await asyncio.gather(*(run(block) for block in blocks(model)))


def test_each_task_has_its_own_selection(model, monkeypatch):
    expected = answers_of(model)
    assert all(map(torch.equal, asyncio.run(answer_in_tasks(model)), expected))
    assert torch.equal(answer(model), expected[0])
    monkeypatch.setattr(state, "_STATE", Shared())
    assert not all(map(torch.equal, asyncio.run(answer_in_tasks(model)), expected))


def test_what_a_task_starts(model):
    adapted_output, base, *_ = answers_of(model)

    async def here() -> Tensor:
        await asyncio.sleep(0)
        return answer(model)

    async def run() -> list[Tensor]:
        loop = asyncio.get_running_loop()
        with disabled(model):
            inherits = asyncio.create_task(here())
            hops = await asyncio.to_thread(answer, model)
            plain = await loop.run_in_executor(None, answer, model)
            bound = await loop.run_in_executor(None, bind(answer), model)
            kept = bind(here)
        return [await inherits, hops, bound, await kept(), plain, await here()]

    *bases, plain, after = asyncio.run(run())
    assert all(torch.equal(one, base) for one in bases)
    assert torch.equal(plain, adapted_output)
    assert torch.equal(after, adapted_output)


# Copies


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_a_selection_of_their_own(model, clone):
    adapted_output, base, *_ = answers_of(model)
    with disabled(model):
        other = clone(model)
        assert torch.equal(answer(other), adapted_output)
        with selected(model, METHODS), disabled(other):
            assert torch.equal(answer(other), base)
            assert torch.equal(answer(model), adapted_output)
        part = clone(model.layer[0])
        assert len(list(iter_acting(part))) == 2
        with disabled(part):
            assert not list(iter_acting(part))
    selectors = {id(host._modules[RESERVED].selector) for _, host, _ in iter_acting(other)}
    assert len(selectors) == 1
    mine, its = (next(iter(iter_acting(one)))[1]._modules[RESERVED].selector for one in (model, other))
    assert mine.token != its.token
    its.token = mine.token
    with disabled(model):
        assert torch.equal(answer(other), base)
