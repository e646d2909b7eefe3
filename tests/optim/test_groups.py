import pytest
import torch
from torch import nn

from lora_lightning import BottleneckAdapter, DoRA, LoRA, Optim, attach, param_groups
from lora_lightning.adapters import iter_roles
from lora_lightning.errors import ConfigError
from lora_lightning.optim import build_optimizer
from tests import models


class Small(nn.Module):
    """An embedding, two linear layers with biases and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids)).relu()).mean(1))


def table(groups):
    """Name -> (rate, weight decay, elements)."""
    return {g["name"]: (g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups}


def num_trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_plus_groups_have_exactly_the_expected_roles_and_rates():
    model = Small()
    attach(model, DoRA(r=2, target_modules=["embed", "up", "down"], modules_to_save=["head"]))
    optim = Optim(lr=1e-4, head_lr=1e-3, lora_plus_ratio=16, weight_decay=0.01)
    groups = param_groups(model, optim)
    print(
        *(f"{name:22} lr {lr:.1e}  weight decay {wd:g}  {n} elements" for name, (lr, wd, n) in table(groups).items()),
        sep="\n",
    )
    assert table(groups) == {
        "embedding": (1e-6, 0.01, 2 * 11 + 8 * 2),
        "magnitude, no decay": (1e-4, 0.0, 8 + 16 + 8),
        "A": (1e-4, 0.01, 2 * 8 + 2 * 16),
        "B": (pytest.approx(1.6e-3), 0.01, 16 * 2 + 8 * 2),
        "head": (1e-3, 0.01, 8 * 3),
        "head, no decay": (1e-3, 0.0, 3),
    }
    assert sum(n for _, _, n in table(groups).values()) == num_trainable(model)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert all(g["params"] for g in groups)


def test_without_lora_plus_all_adapters_share_the_base_rate():
    model = Small()
    attach(model, LoRA(r=2, target_modules=["embed", "up"]))
    rates = {name: lr for name, (lr, _, _) in table(param_groups(model, Optim(lr=3e-4))).items()}
    assert rates == {"embedding": 3e-4, "A": 3e-4, "B": 3e-4}


def test_embedding_rate_given_by_the_user_wins():
    model = Small()
    attach(model, LoRA(r=2, target_modules=["embed", "up"]))
    groups = table(param_groups(model, Optim(lr=3e-4, embedding_lr=5e-5, lora_plus_ratio=4)))
    assert groups["embedding"][0] == 5e-5
    assert groups["B"][0] == pytest.approx(1.2e-3)


def test_trainable_parameters_that_no_adapter_owns_count_as_head():
    outer = nn.ModuleDict({"model": Small(), "extra": nn.Linear(3, 3, bias=False)})
    attach(outer["model"], LoRA(r=2, target_modules=["up"]))
    groups = param_groups(outer, Optim(lr=1e-4, head_lr=1e-2))
    assert table(groups)["head"] == (1e-2, 0.0, 9)
    assert sum(n for _, _, n in table(groups).values()) == num_trainable(outer)


def test_roles_come_from_the_modules_not_from_names():
    """A module called lora_B in the base model is no B factor."""
    model = nn.ModuleDict({"lora_B": nn.Linear(4, 4)})
    attach(model, LoRA(r=2, target_modules=["lora_B"]))
    roles = {name: role.value for name, _, role in iter_roles(model)}
    assert roles == {"lora_B.lora_A": "A", "lora_B.lora_B": "B"}


def test_a_frozen_model_is_refused():
    with pytest.raises(ConfigError, match="attach a method first"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), Optim())


def test_lora_plus_without_a_b_factor_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="lora_plus_ratio"):
        param_groups(model, Optim(lora_plus_ratio=16))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "RMSprop"])
def test_any_optimizer_class_steps_with_the_rates_of_its_groups(name):
    torch.manual_seed(0)
    model = Small()
    attach(model, LoRA(r=2, target_modules=["up"], modules_to_save=["head"]))
    optimizer = build_optimizer(model, Optim(lr=1e-3, head_lr=1e-2, optimizer=name))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randint(0, 11, (4, 5))).square().sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad and p.grad.abs().sum() > 0}
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-3, 1e-2]


def test_lora_plus_leaves_bottlenecks_alone():
    """A bottleneck's matrices are no factors of one product, which is what LoRA+ derives its two rates for."""
    optim = Optim(lr=1e-3, lora_plus_ratio=8, weight_decay=0.01)
    model = models.build("bert")
    attach(model, [LoRA(r=2), BottleneckAdapter(width=4)])
    rates = table(param_groups(model, optim))
    assert {name: (lr, decay) for name, (lr, decay, _) in rates.items()} == {
        "A": (1e-3, 0.01),
        "B": (8e-3, 0.01),
        "weight": (1e-3, 0.01),
        "bias, no decay": (1e-3, 0.0),
    }
    assert rates["weight"][2] == 4 * 2 * 4 * 32
    alone = models.build("bert")
    attach(alone, BottleneckAdapter(width=4))
    with pytest.raises(ConfigError, match="no adapter of this model has one"):
        param_groups(alone, optim)


@pytest.mark.parametrize(
    ("optimizer", "is_fused"),
    [
        ("AdamW", True),
        ("SGD", True),
        ("RMSprop", None),
        ({"class_path": "AdamW", "init_args": {"foreach": True}}, None),
        ({"class_path": "AdamW", "init_args": {"fused": False}}, False),
    ],
    ids=["adamw", "sgd", "no kernel", "another choice", "switched off"],
)
def test_fused_kernels_are_taken_where_there_are_any(optimizer, is_fused):
    model = Small()
    attach(model, LoRA(r=2, target_modules=["up"]))
    built = build_optimizer(model, Optim(optimizer=optimizer))
    assert built.defaults.get("fused") is is_fused
    assert build_optimizer(model, Optim(optimizer=optimizer), may_fuse=False).defaults.get("fused") is not True


def test_a_fused_step_is_the_plain_one():
    stepped = []
    for may_fuse in (True, False):
        torch.manual_seed(3)
        model = Small().double()
        attach(model, LoRA(r=2, target_modules=["up", "down"]))
        optimizer = build_optimizer(model, Optim(lr=0.1, weight_decay=0.1, lora_plus_ratio=4), may_fuse=may_fuse)
        for step in range(3):
            model(torch.arange(6).view(2, 3) + step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        stepped.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*stepped, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(stepped[0], torch.zeros_like(stepped[0]))
