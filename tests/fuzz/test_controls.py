"""What the fuzz test expects of a model is what the base itself does: each bound and each control, seen to fail."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from lora_lightning.methods import LoRA, PrefixTuning, PromptTuning
from tests.fuzz import steps
from tests.fuzz.architectures import PLAIN, Architecture, build
from tests.fuzz.draws import Setting
from tests.fuzz.world import World, tolerance

pytestmark = pytest.mark.filterwarnings("ignore")  # each architecture has its own


def world_of(folder, name, kind=PLAIN, dtype=torch.float32, method=None):
    base, batch = build(Architecture(name, kind), dtype)
    world = World(
        Architecture(name, kind), base, batch, random.Random(1), folder, build(Architecture(name, kind), dtype)[0]
    )
    world.setting = Setting([method or LoRA(r=2, target_modules=["head"])])
    return world


class Chain(nn.Module):
    """Layers each of which makes a difference of its input several times as large."""

    def __init__(self, depth, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(16, 16, generator=generator) for _ in range(depth)]
        self.weights = nn.ParameterList([nn.Parameter(weight.to(dtype)) for weight in weights])

    def forward(self, x):
        for weight in self.weights:
            x = torch.sin(x @ weight)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bound_follows_the_depth_in_every_dtype(dtype):
    x, eps = {"x": torch.linspace(-1, 1, 16, dtype=dtype)[None]}, torch.finfo(dtype).eps
    deep, shallow = (tolerance(Chain(depth, dtype), x) / eps for depth in (12, 1))
    assert deep > 20 * shallow
    assert shallow < 60 * 20


def test_a_base_that_draws_for_longer_rows_is_seen(tmp_path):
    draws = world_of(tmp_path, "reformer", "sequence", method=PromptTuning(num_virtual_tokens=3))
    assert steps.base_draws(draws)
    draws.setting = Setting([LoRA(r=2)])
    assert not steps.base_draws(draws)
    assert not steps.base_draws(world_of(tmp_path, "bert", "sequence", method=PromptTuning(num_virtual_tokens=3)))


def test_a_copy_fails_only_where_the_base_keeps_a_history_too(tmp_path):
    world = world_of(tmp_path, "old-spectral-norm")
    steps.hang(world.model, world)
    world.model.train()
    world.model.requires_grad_()
    steps.loss_of(world.model, world.batch).backward()
    world.duplicate()
    other = world_of(tmp_path, "mlp")
    other.model.kept = other.model(**other.batch)
    with pytest.raises(RuntimeError, match="graph leaves"):
        other.duplicate()


def test_a_base_that_does_not_train_under_autocast_is_seen(tmp_path):
    codes = world_of(tmp_path, "codes")
    assert steps.base_trains(codes)
    assert not steps.base_trains(codes, torch.bfloat16)
    assert steps.base_trains(world_of(tmp_path, "mlp"), torch.bfloat16)


def test_only_routed_attention_may_differ_by_the_eager_softmax(tmp_path):
    world = world_of(tmp_path, "llama", "causal", torch.float64, PrefixTuning(num_virtual_tokens=2))
    assert world.eps() == 16 * torch.finfo(torch.float64).eps
    for model in (world.base, world.model):
        model.set_attn_implementation("eager")
    assert world.eps() == 16 * torch.finfo(torch.float64).eps
    steps.hang(world.model, world)
    assert world.eps() == 16 * torch.finfo(torch.float32).eps
    assert world.eps(dtype=torch.bfloat16) == 16 * torch.finfo(torch.bfloat16).eps
    assert world.eps(world.base) == 16 * torch.finfo(torch.float64).eps
