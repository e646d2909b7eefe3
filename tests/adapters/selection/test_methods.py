"""The selection and every method: what acts in another thread, and what checkpointing computes again in backward."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from lora_lightning.adapters import attach, bind, detach, disabled, iter_acting, iter_roles
from lora_lightning.adapters.selection.checkpointing import SelectionCheckpoint, unfollow_selection
from lora_lightning.methods import LoRA, PrefixTuning, PromptTuning
from lora_lightning.methods.recompute import recompute_activations
from tests import models
from tests.contract.examples import CASES, Example
from tests.contract.steps import adapted, largest_gap, step

Backward = Callable[[nn.Module, Tensor], None]


# Hosts that the contract has not: experts, trained copies, a decoder that attends to a prompt.
MORE = {
    "experts-mixtral": (Example(method=LoRA(r=2, target_modules=["q_proj", "experts"])), "mixtral"),
    "copies-bert": (Example(method=LoRA(r=2, modules_to_save=["LayerNorm", "classifier"])), "bert"),
    "prompt-t5": (Example(method=PromptTuning(num_virtual_tokens=3)), "t5"),
    "prefix-t5": (Example(method=PrefixTuning(num_virtual_tokens=3)), "t5"),
}
ALL_CASES = {**CASES, **MORE}


@pytest.fixture(params=ALL_CASES)
def case(request) -> tuple[Example, str]:
    return ALL_CASES[request.param]


@pytest.fixture
def example(case) -> Example:
    return case[0]


@pytest.fixture
def model(case) -> nn.Module:
    example, architecture = case
    return adapted(models.build(architecture), example.method)


def in_a_thread(function: Callable[[], None]) -> None:
    """Run a function in a thread of its own, and raise what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def here(model: nn.Module, loss: Tensor) -> None:
    loss.backward()


def under_disabled(model: nn.Module, loss: Tensor) -> None:
    with disabled(model):
        loss.backward()


def elsewhere(model: nn.Module, loss: Tensor) -> None:
    in_a_thread(loss.backward)


def elsewhere_under_disabled(model: nn.Module, loss: Tensor) -> None:
    in_a_thread(lambda: under_disabled(model, loss))


BACKWARDS = {"disabled": under_disabled, "thread": elsewhere, "thread-disabled": elsewhere_under_disabled}


def gradients(model: nn.Module, backward: Backward) -> dict[str, Tensor]:
    """Return the adapter gradients of a step whose backward pass runs as told."""
    model.zero_grad()
    loss = models.logits(model, models.inputs(model)).float().square().mean()
    backward(model, loss)
    return {name: parameter.grad for name, parameter, _ in iter_roles(model) if parameter.grad is not None}


def enable(model: nn.Module, use_reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})


def test_another_thread_follows_its_own_selection(model):
    with torch.no_grad():
        expected = models.logits(model)
        with disabled(model):
            base = models.logits(model)
        answers = {}

        def answer_beside_a_base() -> None:
            answers["adapted"] = models.logits(model)
            with disabled(model):
                answers["base"] = models.logits(model)

        with disabled(model):
            in_a_thread(answer_beside_a_base)
            answers["base here"] = models.logits(model)
    assert models.gap(answers["adapted"], expected) <= 1e-6
    assert models.gap(answers["base"], base) <= 1e-6
    assert torch.equal(answers["base here"], base)
    assert models.gap(expected, base) > 1e-3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_keep_the_selection_of_their_forward(model, example, use_reentrant):
    model.train()
    expected = step(model)
    enable(model, use_reentrant)
    for backward in BACKWARDS.values():
        assert largest_gap(gradients(model, backward), expected, example) <= 1e-6


# Checkpointing on one model, in detail


@pytest.fixture
def llama() -> nn.Module:
    return adapted(models.build("llama"), LoRA(r=4, target_modules="all-linear")).train()


LORA = Example(method=LoRA())


def is_wrong(model: nn.Module, expected: dict[str, Tensor], backward: Backward) -> bool:
    """Tell whether gradients are missing, others, or refused by torch's own check."""
    try:
        actual = gradients(model, backward)
    except (CheckpointError, RuntimeError):
        return True
    return actual.keys() != expected.keys() or largest_gap(actual, expected, LORA) > 1e-3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_without_ours_checkpoints_go_wrong(llama, use_reentrant):
    expected = step(llama)
    enable(llama, use_reentrant)
    assert not is_wrong(llama, expected, under_disabled)
    unfollow_selection(llama)
    assert is_wrong(llama, expected, under_disabled)
    assert not is_wrong(llama, expected, here)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_of_the_base_gives_adapters_no_gradient(llama, use_reentrant):
    def forward_off_backward_on() -> set[str]:
        llama.zero_grad()
        with disabled(llama):
            loss = models.logits(llama, models.inputs(llama)).square().mean()
        loss.backward()
        return {name for name, parameter, _ in iter_roles(llama) if parameter.grad is not None}

    enable(llama, use_reentrant)  # which makes the embeddings' output require a gradient
    assert not forward_off_backward_on()
    if use_reentrant:  # the other kind notices that another number of tensors is saved
        unfollow_selection(llama)
        assert forward_off_backward_on()


def test_the_selection_is_what_it_was_after_a_backward_elsewhere(llama):
    enable(llama, use_reentrant=False)
    with disabled(llama):
        loss = models.logits(llama, models.inputs(llama)).square().mean()
    loss.backward()
    assert len(list(iter_acting(llama))) == 14
    loss = models.logits(llama, models.inputs(llama)).square().mean()
    with disabled(llama):
        loss.backward()
        assert not list(iter_acting(llama))


def pickled(model: nn.Module) -> nn.Module:
    """Return a copy through pickle, which takes no hook that transformers hangs on the embeddings."""
    model.disable_input_require_grads()
    other = pickle.loads(pickle.dumps(model))
    other.enable_input_require_grads()
    return other


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, None])
def test_checkpointing_may_be_enabled_at_any_time_and_is_copied(when, clone):
    model = models.build("llama")
    if when == "before":
        enable(model, use_reentrant=True)
    adapted(model, LoRA(r=4, target_modules="all-linear")).train()
    if when == "after":
        enable(model, use_reentrant=True)
    expected = step(model)
    if clone is not None:
        model = clone(model)
    for _ in range(2):
        assert not is_wrong(model, expected, under_disabled)
    layer = model.model.layers[0]
    assert isinstance(layer._gradient_checkpointing_func, SelectionCheckpoint)
    detach(model)
    assert isinstance(layer._gradient_checkpointing_func, partial)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=list(BACKWARDS))
def test_recomputed_activations_keep_the_selection_of_their_forward(llama, backward):
    expected = step(llama)
    recompute_activations(llama)
    assert not is_wrong(llama, expected, backward)
    with disabled(llama):
        assert models.logits(llama, models.inputs(llama)).grad_fn is None


class OwnCheckpoints(nn.Module):
    """A model whose forward calls torch's checkpoint itself."""

    def __init__(self, hand_over: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.layer, self.hand_over = nn.Linear(4, 4), hand_over

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.hand_over(self.layer), x, use_reentrant=True)


@pytest.mark.parametrize(("hand_over", "is_right"), [(bind, True), (lambda layer: layer, False)])
def test_a_models_own_checkpoint_calls_take_a_bound_function(hand_over, is_right):
    model, x = OwnCheckpoints(hand_over), torch.ones(2, 4, requires_grad=True)
    attach(model, LoRA(r=2, target_modules=["layer"]))
    models.perturb(model)
    found = []
    for block in (nullcontext(), disabled(model)):
        model.zero_grad()
        loss = model(x).square().sum()
        with block, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss.backward()
        found.append([parameter.grad for _, parameter, _ in iter_roles(model)])
    reference, actual = found
    assert all(gradient is not None for gradient in reference)
    same = all(one is not None and torch.equal(one, other) for one, other in zip(actual, reference, strict=True))
    assert same == is_right
