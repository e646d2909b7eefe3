"""AdaLoRA against PEFT with copied weights, its budget and pruning, and that a resumed run decides the same."""

import copy

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from lora_lightning.adapters import attach, iter_adapters, iter_roles
from lora_lightning.backbones.attach import attach as attach_backbone
from lora_lightning.errors import ConfigError
from lora_lightning.methods import AdaLoRA
from tests import models
from tests.tasks.toys import Tagger, loader, trainer

pytestmark = [
    # PEFT's own use of transformers.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
TARGETS = ["query", "value"]
METHOD = AdaLoRA(target_r=2, init_r=4, t_init=1, t_final=3, delta_t=2, alpha=32, target_modules=TARGETS)
TOTAL = 10


def with_peft(model: nn.Module) -> nn.Module:
    config = peft.AdaLoraConfig(
        target_r=2, init_r=4, tinit=1, tfinal=3, deltaT=2, lora_alpha=32, target_modules=TARGETS, total_step=TOTAL
    )
    theirs = peft.get_peft_model(model, config)
    for module in theirs.modules():
        if hasattr(module, "ranknum"):
            module.scaling["default"] *= (4 + 1e-5) / 4  # PEFT divides by 4 + 1e-5, which shows in the gradients
    return theirs


def pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return each of our adapter parameters with PEFT's counterpart."""
    return [
        (parameter, getattr(theirs.base_model.model.get_submodule(path), name)["default"])
        for path, _, adapter in iter_adapters(ours)
        for name, parameter in adapter.named_parameters()
    ]


@torch.no_grad()
def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for parameter, counterpart in pairs(ours, theirs):
        counterpart.copy_(parameter.view_as(counterpart))


def both(std: float = 0.3) -> tuple[nn.Module, nn.Module]:
    ours, theirs = models.build("bert"), models.build("bert")
    attach_backbone(ours, METHOD)
    theirs = with_peft(theirs)
    copy_weights(models.perturb(ours, std=std), theirs)
    return ours, theirs


def adapters(model: nn.Module) -> list[nn.Module]:
    return [adapter for _, _, adapter in iter_adapters(model)]


def alive(model: nn.Module) -> list[list[bool]]:
    return [(adapter.lora_E != 0).tolist() for adapter in adapters(model)]


def test_starts_like_peft():
    model = nn.Sequential(nn.Linear(400, 300))
    attach(model, AdaLoRA())
    (adapter,) = adapters(model)
    assert adapter.lora_A.shape == (12, 400)
    assert adapter.lora_B.shape == (300, 12)
    assert adapter.lora_A.std().item() == pytest.approx(0.02, rel=0.05)
    assert adapter.lora_B.std().item() == pytest.approx(0.02, rel=0.05)
    assert not adapter.lora_E.any()
    models.perturb(model)
    adapter.reset_parameters()
    assert not adapter.lora_E.any()


def test_equals_peft():
    ours, theirs = (model.double() for model in both())
    batch = models.inputs(ours)
    outputs = [models.logits(model, batch) for model in (ours, theirs)]
    assert models.gap(models.logits(models.build("bert"), batch), outputs[1]) > 1e-2
    assert models.gap(*outputs) <= 1e-10
    for output in outputs:
        output.square().mean().backward()
    for parameter, counterpart in pairs(ours, theirs):
        assert models.gap(parameter.grad, counterpart.grad.view_as(parameter)) <= 1e-10
    with torch.no_grad():
        adapters(ours)[0].lora_E[0] += 0.1
        assert models.gap(models.logits(ours, batch), outputs[1]) > 1e-4


def test_the_penalty_equals_pefts():
    ours, theirs = both()
    batch = {**models.inputs(ours), "labels": torch.tensor([0, 1, 2])}
    expected = theirs.base_model(**batch).loss - theirs.base_model.model(**batch).loss
    assert models.gap(METHOD.extra_loss(ours), expected) <= 1e-5
    adapter = adapters(ours)[0]
    squared = sum(
        (gram.double() - torch.eye(4)).square().sum()
        for gram in (adapter.lora_A @ adapter.lora_A.t(), adapter.lora_B.t() @ adapter.lora_B)
    )
    assert models.gap(adapter.orthogonality(), squared) > 0.1  # the paper's squares are something else
    METHOD.extra_loss(ours).backward()
    assert adapter.lora_A.grad.any()
    assert adapter.lora_B.grad.any()
    assert AdaLoRA(orthogonality_weight=0).extra_loss(ours) is None


def backward(model: nn.Module, seed: int) -> None:
    """Leave gradients of a random direction of the output on the adapters."""
    model.zero_grad()
    output = models.logits(
        model, models.inputs(model.base_model if hasattr(model, "peft_config") else model, seed=seed)
    )
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))).sum().backward()


@torch.no_grad()
def move(model: nn.Module, names: str = "lora_") -> None:
    """Take a step of plain gradient descent."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and names in name:
            parameter.sub_(parameter.grad, alpha=0.02)


def test_importance_and_masks_equal_pefts():
    """PEFT takes the weights after the update and we before it, so it is asked before its update here."""
    ours, theirs = both()
    allocator: RankAllocator = theirs.base_model.rankallocator
    num_pruned = []
    for step in range(6):  # PEFT counts 1 where the first update is done
        backward(ours, seed=step)
        backward(theirs, seed=step)
        METHOD.before_step(ours, step, TOTAL)
        budget, pattern = allocator.update_and_allocate(theirs.base_model.model, step + 1)
        METHOD.after_step(ours, step, TOTAL)
        assert METHOD.budget(step + 1, TOTAL, num_hosts=4) == budget
        assert (pattern is not None) == (step in (1, 3, 5))
        for path, _, adapter in iter_adapters(ours):
            for part in ("lora_A", "lora_E", "lora_B"):
                key = f"{path}.{part}.default"
                sensitivity = allocator.exp_avg_ipt[key].view_as(getattr(adapter, part))
                uncertainty = allocator.exp_avg_unc[key].view_as(getattr(adapter, part))
                assert models.gap(getattr(adapter, f"{part}_sensitivity"), sensitivity) <= 1e-4
                assert models.gap(getattr(adapter, f"{part}_uncertainty"), uncertainty) <= 1e-4
            if pattern is not None:
                assert (adapter.lora_E != 0).tolist() == pattern[f"{path}.lora_E.default"]
        if pattern is not None:
            num_pruned.append(sum(row.count(False) for row in alive(ours)))
            expected = [theirs.base_model.model.get_submodule(path).lora_E for path, _, _ in iter_adapters(ours)]
            assert alive(ours) == [(values["default"].view(-1) != 0).tolist() for values in expected]
        move(ours)
        move(theirs)
    assert num_pruned == [16 - METHOD.budget(step, TOTAL, 4) for step in (2, 4, 6)]


def test_the_score_of_a_triplet_is_the_formula():
    model = nn.Sequential(nn.Linear(7, 5)).double()
    method = AdaLoRA(target_r=2, init_r=3, beta1=0.7, beta2=0.6)
    attach(model, method)
    (adapter,) = adapters(models.perturb(model))
    mean = {name: torch.zeros_like(parameter) for name, parameter in adapter.named_parameters()}
    spread = copy.deepcopy(mean)
    for step in range(3):
        model.zero_grad()
        (model(torch.randn(4, 7).double()) ** 2).sum().backward()
        for name, parameter in adapter.named_parameters():
            now = (parameter * parameter.grad).abs().detach()
            mean[name] = 0.7 * mean[name] + 0.3 * now
            spread[name] = 0.6 * spread[name] + 0.4 * (now - mean[name]).abs()
        method.before_step(model, step, 100)
    parts = {name: mean[name] * spread[name] for name in mean}
    expected = parts["lora_E"] + parts["lora_A"].sum(1) / 7 + parts["lora_B"].sum(0) / 5
    assert models.gap(adapter.triplet_scores(), expected) <= 1e-12
    assert models.gap(adapter.triplet_scores(), parts["lora_E"]) > 1e-2


def run(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer, method: AdaLoRA = METHOD) -> list[int]:
    """Train for some steps; return how many triplets are alive after each."""
    counts = []
    for step in steps:
        backward(model, seed=step)
        method.before_step(model, step, TOTAL)
        optimizer.step()
        method.after_step(model, step, TOTAL)
        counts.append(sum(map(sum, alive(model))))
    return counts


def started() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = models.build("bert")
    attach_backbone(model, METHOD)
    return model, torch.optim.AdamW([p for _, p, _ in iter_roles(model)], lr=1e-2)


def test_ends_at_its_target_and_stays_there():
    model, optimizer = started()
    counts = run(model, range(TOTAL), optimizer)
    assert counts[0] == 16
    assert counts[6:] == [8, 8, 8, 8]  # three final steps after the pruning that follows the seventh
    final = alive(model)
    dead = [adapter.lora_E[~adapter.kept] for adapter in adapters(model)]
    assert not any(values.any() for values in dead)
    before = models.logits(model)
    for adapter, row in zip(adapters(model), final, strict=True):
        a, b = adapter.pruned_factors()
        rank = max(sum(row), 1)
        assert a.shape == (rank, 32)
        assert b.shape == (32, rank)
        full_a, full_b = adapter.factors()
        assert models.gap(b @ a, full_b @ full_a) <= 1e-6
    with torch.no_grad():
        adapters(model)[0].lora_E.add_(1)
    assert models.gap(models.logits(model), before) > 1e-3


def test_a_resumed_run_decides_the_same():
    model, optimizer = started()
    run(model, range(5), optimizer)
    saved = copy.deepcopy((model, METHOD.extra_state(model), optimizer.state_dict()))
    run(model, range(5, TOTAL), optimizer)
    outcomes = []
    for state in (saved[1], {name: tensor.flip(0) for name, tensor in saved[1].items()}):  # and a negative control
        resumed, optimizer = started()
        resumed.load_state_dict(saved[0].state_dict())
        METHOD.load_extra_state(resumed, state)
        optimizer.load_state_dict(copy.deepcopy(saved[2]))
        run(resumed, range(5, TOTAL), optimizer)
        outcomes.append(all(torch.equal(a, b) for a, b in zip(values(resumed), values(model), strict=True)))
    assert outcomes == [True, False]


def values(model: nn.Module) -> list[Tensor]:
    return [parameter for _, parameter, _ in iter_roles(model)]


def test_a_host_without_survivors_keeps_one_empty_row():
    model = nn.Sequential(nn.Linear(8, 6))
    attach(model, AdaLoRA(target_r=2))
    a, b = adapters(model)[0].pruned_factors()
    assert a.shape == (1, 8)
    assert b.shape == (6, 1)
    assert not a.any()


# The resumed run is complete, and only loads.
@pytest.mark.filterwarnings("ignore:Nothing was trained")
def test_fit(tmp_path):
    method = AdaLoRA(target_r=2, init_r=4, delta_t=1, target_modules=["linear1", "linear2"])
    task = Tagger(method=method)
    trained = trainer(max_epochs=3, default_root_dir=tmp_path)
    trained.fit(task, loader())
    assert sum(map(sum, alive(task.model))) == 2 * 4
    assert "train/adalora_penalty" in trained.callback_metrics
    path = tmp_path / "end.ckpt"
    trained.save_checkpoint(path)
    again = Tagger(method=method)
    trainer(max_epochs=3, default_root_dir=tmp_path).fit(again, loader(), ckpt_path=path)
    assert alive(again.model) == alive(task.model)
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(adapters(again.model), adapters(task.model), strict=True))


def test_two_in_one_list_keep_to_their_own(tmp_path):
    """Each has its own budget, penalty and averages; with one budget for both, the hosts would end otherwise."""
    settings = {"delta_t": 1, "t_init": 1, "t_final": 2}
    methods = [
        AdaLoRA(target_r=1, init_r=4, target_modules=["linear1"], **settings),
        AdaLoRA(target_r=3, init_r=4, target_modules=["linear2"], orthogonality_weight=0.25, **settings),
    ]
    task = Tagger(method=methods)
    trained = trainer(default_root_dir=tmp_path)
    trained.fit(task, loader())
    ends = {path: int((adapter.lora_E != 0).sum()) for path, _, adapter in iter_adapters(task.model) if "lin" in path}
    assert sum(num for path, num in ends.items() if path.endswith("linear1")) == 2 * 1
    assert sum(num for path, num in ends.items() if path.endswith("linear2")) == 2 * 3
    assert {"train/adalora_1_penalty", "train/adalora_2_penalty"} <= trained.callback_metrics.keys()
    first, second = (method.extra_state(task.model) for method in methods)
    assert all("linear1" in name for name in first)
    assert all("linear2" in name for name in second)
    own = [adapter for path, _, adapter in iter_adapters(task.model) if path.endswith("linear2")]
    expected = sum(adapter.orthogonality() for adapter in own) / 2 * 0.125
    assert torch.allclose(methods[1].extra_loss(task.model), expected)
    with pytest.raises(
        ConfigError, match=r"This AdaLoRA was not attached to the model, whose methods are: AdaLoRA, AdaLoRA"
    ):
        AdaLoRA(target_r=2).extra_loss(task.model)


def test_a_run_of_unknown_or_too_small_length_is_refused():
    model = models.build("bert")
    attach_backbone(model, METHOD)
    with pytest.raises(ConfigError, match="no known number of steps"):
        METHOD.before_step(model, 0, -1)
    with pytest.raises(ConfigError, match="t_init=1 and t_final=3 leave nothing of a run of 4 steps"):
        METHOD.before_step(model, 0, 4)
    METHOD.before_step(model, 0, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 0}, "target_r must be an integer of at least 1"),
        ({"init_r": 4}, "init_r=4 is below target_r=8"),
        ({"t_init": -1}, "t_init must be an integer of at least 0"),
        ({"t_final": 0.5}, "t_final must be an integer"),
        ({"delta_t": 0}, "delta_t must be"),
        ({"beta1": 1}, "beta1 must lie between 0 and 1"),
        ({"beta2": 0.0}, "beta2 must lie between 0 and 1"),
        ({"orthogonality_weight": -1}, "orthogonality_weight"),
        ({"alpha": 0}, "alpha must be"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaLoRA(**settings)


def test_a_rank_that_a_host_does_not_allow():
    with pytest.raises(ConfigError, match=r"init_r=12 is larger than '0' allows.*at most 6.*target_r"):
        attach(nn.Sequential(nn.Linear(8, 6)), AdaLoRA(target_r=8))
