"""The chunked loss against torch's own, and what it holds, saves and computes."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lora_lightning import DoRA, LoRA, attach
from lora_lightning.backbones.heads.output_head import LogitMap
from lora_lightning.tasks.token_loss import chunked_token_loss, supervised
from tests import models

WIDTH, VOCABULARY = 16, 50
MIB = 2**20


class Language(nn.Module):
    """A head alone, so that methods can be attached to it."""

    def __init__(self, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)


def frozen(**settings):
    return Language(**settings).requires_grad_(requires_grad=False)


def adapted(method, **settings):
    language = Language(**settings)
    attach(language, method)
    return models.perturb(language)


class WithBody(Language):
    """A head beside a layer that takes the adapter."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.body = nn.Linear(WIDTH, WIDTH)


def copied_head(**settings):
    language = WithBody(**settings)
    attach(language, LoRA(r=2, target_modules=["body"], modules_to_save=["head"]))
    return models.perturb(language)


HEADS = {
    "frozen": frozen,
    "trained": Language,
    "copied": copied_head,
    "lora": lambda **s: adapted(LoRA(r=2, target_modules=["head"]), **s),
    "dora": lambda **s: adapted(DoRA(r=2, target_modules=["head"]), **s),
}
MAPS = [LogitMap(), LogitMap(0.25), LogitMap(softcap=2.0), LogitMap(3.0, 5.0)]


def data(num: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (num,), generator=generator)


def materialised(hidden: Tensor, targets: Tensor, head: nn.Module, logit_map: LogitMap) -> Tensor:
    logits = head(hidden).float() * logit_map.scale
    if logit_map.softcap is not None:
        logits = torch.tanh(logits / logit_map.softcap) * logit_map.softcap
    return F.cross_entropy(logits, targets, reduction="sum")


def gradients(loss: Tensor, hidden: Tensor, module: nn.Module) -> list[Tensor]:
    wanted = [parameter for parameter in module.head.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss * 0.3, [hidden, *wanted]))


@pytest.mark.parametrize("logit_map", MAPS, ids=str)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("num", [1, 8, 21])
def test_loss_and_gradients_equal_the_materialised_loss(kind, logit_map, num):
    module = HEADS[kind]()
    hidden, targets = data(num)
    ours = chunked_token_loss(hidden, targets, module.head, logit_map, chunk_size=8)
    reference = materialised(hidden, targets, module.head, logit_map)
    assert models.gap(ours.loss, reference) < 1e-6
    assert ours.num_tokens == num
    found, expected = gradients(ours.loss, hidden, module), gradients(reference, hidden, module)
    assert len(found) == len(expected) == {"frozen": 1, "dora": 4}.get(kind, 3)
    assert all(models.gap(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))
    other_map = gradients(materialised(hidden, targets, module.head, LogitMap(0.5, 9.0)), hidden, module)
    assert models.gap(found[0], other_map[0]) > 1e-2


@pytest.mark.parametrize("kind", HEADS)
def test_bfloat16_bases_work_as_the_materialised_loss_does(kind):
    module = HEADS[kind](dtype=torch.bfloat16)
    hidden, targets = data(21, torch.bfloat16)
    ours = chunked_token_loss(hidden, targets, module.head, chunk_size=8)
    reference = materialised(hidden, targets, module.head, LogitMap())
    assert ours.loss.dtype == torch.float32
    assert models.gap(ours.loss, reference) < 1e-6
    found, expected = gradients(ours.loss, hidden, module), gradients(reference, hidden, module)
    assert all(one.dtype == other.dtype for one, other in zip(found, expected, strict=True))
    assert all(models.gap(one, other) < 2e-2 for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", HEADS)
def test_autocast_casts_the_head(kind):
    module = HEADS[kind]()
    hidden, targets = data(21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = chunked_token_loss(hidden, targets, module.head, chunk_size=8)
        reference = materialised(hidden, targets, module.head, LogitMap())
        exact = chunked_token_loss(hidden.double(), targets, nn.Linear(WIDTH, VOCABULARY).double())
    assert models.gap(ours.loss, reference) < 1e-6
    assert exact.loss.dtype == torch.float64
    found, expected = gradients(ours.loss, hidden, module), gradients(reference, hidden, module)
    assert all(one.dtype == torch.float32 for one in found)
    assert all(models.gap(one, other) < 2e-2 for one, other in zip(found, expected, strict=True))


def test_a_frozen_head_under_frozen_hidden_states_only_sums():
    module = frozen()
    hidden, targets = data(21)
    ours = chunked_token_loss(hidden.detach(), targets, module.head, chunk_size=8)
    assert not ours.loss.requires_grad
    assert models.gap(ours.loss, materialised(hidden, targets, module.head, LogitMap())) < 1e-6
    right = (module.head(hidden).argmax(1) == targets).sum()
    assert ours.num_right == right == chunked_token_loss(hidden, targets, module.head).num_right
    assert chunked_token_loss(hidden, module.head(hidden).argmax(1), module.head).num_right == 21 > right


def test_a_trained_head_needs_no_gradient_of_the_hidden_states():
    module = Language()
    hidden, targets = data(21)
    chunked_token_loss(hidden.detach(), targets, module.head, chunk_size=8).loss.backward()
    expected = torch.autograd.grad(materialised(hidden, targets, module.head, LogitMap()), module.head.weight)[0]
    assert models.gap(module.head.weight.grad, expected) < 1e-5


@pytest.mark.parametrize("kind", HEADS)
def test_without_tokens_the_loss_is_zero_and_every_gradient_too(kind):
    module, called = HEADS[kind](), []
    module.head.register_forward_hook(lambda *_: called.append(True))
    hidden, targets = data(0)
    ours = chunked_token_loss(hidden, targets, module.head)
    assert ours.loss == ours.num_tokens == ours.num_right == 0
    assert all(not gradient.any() for gradient in gradients(ours.loss, hidden, module))
    assert called


def test_given_logits_are_left_alone():
    logits, targets = torch.randn(9, VOCABULARY, requires_grad=True), torch.arange(9)
    before = logits.detach().clone()
    ours = chunked_token_loss(logits, targets, nn.Identity(), chunk_size=4)
    (found,) = torch.autograd.grad(ours.loss, logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    assert torch.equal(logits, before)
    assert models.gap(found, expected) < 1e-6


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    head = nn.Linear(1, 3, bias=False)
    nn.init.constant_(head.weight, 1.0)
    with torch.no_grad():
        head.weight[0] = -1
    ours = chunked_token_loss(hidden, torch.tensor([0, 0]), head)
    assert ours.loss.item() == pytest.approx(600 + 2 * 0.6931472 - 0.6931472, rel=1e-6)
    assert torch.isfinite(torch.autograd.grad(ours.loss, hidden)[0]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HEADS)
def test_a_gpu_gives_the_same_numbers(kind):
    module = HEADS[kind]()
    hidden, targets = data(21)
    expected = chunked_token_loss(hidden, targets, module.head, LogitMap(softcap=2.0), chunk_size=8)
    reference = gradients(expected.loss, hidden, module)
    module.cuda()
    there = hidden.detach().cuda().requires_grad_()
    ours = chunked_token_loss(there, targets.cuda(), module.head, LogitMap(softcap=2.0), chunk_size=8)
    assert models.gap(ours.loss.cpu(), expected.loss) < 1e-5
    found = gradients(ours.loss, there, module)
    assert all(models.gap(one.cpu(), other) < 1e-4 for one, other in zip(found, reference, strict=True))


# What is predicted from where.


def test_labels_are_shifted_by_one():
    labels = torch.tensor([[-100, -100, 5, 6], [9, -100, 7, -100]])
    positions, targets = supervised({"labels": labels})
    assert positions.tolist() == [1, 2, 5]  # the first token of a row has nothing before it
    assert targets.tolist() == [5, 6, 7]


def test_a_document_is_not_predicted_from_the_one_before():
    batch = {"labels": torch.tensor([[1, 2, 3, 4]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    positions, targets = supervised(batch)
    assert (positions.tolist(), targets.tolist()) == ([0, 2], [2, 4])
    assert len(supervised({"labels": batch["labels"]})[0]) == 3


def test_nothing_is_predicted_from_padding():
    batch = {"labels": torch.tensor([[-100, -100, 3, 4]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    assert supervised(batch)[1].tolist() == [4]
    assert supervised({**batch, "attention_mask": torch.ones(1, 1, 4, 4)})[1].tolist() == [3, 4]


# What it costs on a vocabulary of 262,144 words with 256 tokens.

NUM_TOKENS, NUM_WORDS, NARROW = 256, 262_144, 48


@pytest.fixture(scope="module")
def large():
    torch.manual_seed(0)
    head = nn.Linear(NARROW, NUM_WORDS, bias=False).requires_grad_(requires_grad=False)
    return torch.randn(NUM_TOKENS, NARROW, requires_grad=True), torch.randint(NUM_WORDS, (NUM_TOKENS,)), head


def chunked(hidden, targets, head):
    return chunked_token_loss(hidden, targets, head).loss


def usual(hidden, targets, head):
    return F.cross_entropy(head(hidden), targets, reduction="sum")


def saved_bytes(function, hidden, targets, head) -> int:
    """Return the bytes kept for backward, less those of the hidden states and the frozen head."""
    saved: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (hidden, targets, head.weight)}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = function(hidden, targets, head)
    del loss
    return sum(size for pointer, size in saved.items() if pointer not in known)


def peak_bytes(function, hidden, targets, head) -> int:
    """Return the most that the CPU allocator held at one time during forward and backward."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.autograd.grad(function(hidden, targets, head), hidden)
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_it_saves_next_to_nothing_for_backward(large):
    assert saved_bytes(chunked, *large) <= 2 * MIB
    assert saved_bytes(usual, *large) >= 256 * MIB


def test_its_peak_is_at_most_a_third(large):
    ours, reference = peak_bytes(chunked, *large), peak_bytes(usual, *large)
    assert reference >= 2 * 256 * MIB
    assert ours <= reference / 3


def test_its_gradients_are_those_of_the_materialised_loss(large):
    hidden = large[0]
    found, expected = (torch.autograd.grad(function(*large), hidden)[0] for function in (chunked, usual))
    assert (found - expected).abs().max() <= 1e-5
    assert expected.abs().max() > 1e-2


def test_unsupervised_positions_cost_nothing(large):
    hidden, targets, head = large
    labels = torch.full((1, NUM_TOKENS + 1), -100)
    labels[0, -NUM_TOKENS // 4 :] = targets[: NUM_TOKENS // 4]
    positions, wanted = supervised({"labels": labels})
    flops = {}
    for name, function, rows, words in (
        ("quarter", chunked, hidden[positions], wanted),
        ("all", chunked, hidden.clone(), targets),
        ("usual", usual, hidden.clone(), targets),
    ):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(function(rows, words, head), rows)
        flops[name] = counter.get_total_flops()
    assert flops["quarter"] <= 0.35 * flops["usual"]
    assert flops["all"] == flops["usual"]
