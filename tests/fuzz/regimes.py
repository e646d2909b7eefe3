"""Steps that run a model in another way: with gradient checkpointing, in another dtype, under autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import disabled, iter_hosts
from tests.fuzz.steps import STEPS, base_trains, loss_of
from tests.fuzz.world import Fault, World, answers, distance


def recompute(world: World) -> None:
    """Gradients with gradient checkpointing are those without."""
    model = world.duplicate()
    if not getattr(model, "supports_gradient_checkpointing", False) or not base_trains(world):
        return
    plain, same = gradients(model, world), gradients(model, world)
    if any(not torch.equal(plain[name], same[name]) for name in plain):
        return  # draws of its own in each call
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if not base_recomputes(world):
        return
    found = gradients(model, world)
    worst = max((distance([found[name]], [plain[name]]) for name in plain), default=0.0)
    if worst > 1e-3:
        raise Fault(f"gradients with checkpointing: off by {worst:.1e}")


def base_recomputes(world: World) -> bool:
    """Return whether the base takes checkpointing where the modules that have adapters are all that trains."""
    base = world.copy_of_base().requires_grad_(requires_grad=False)
    for path, _ in iter_hosts(world.model):
        base.get_submodule(path).requires_grad_()
    try:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        gradients(base, world)
    except Exception:
        return False
    return True


def gradients(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Return the gradient of each trainable parameter, after the same seed."""
    torch.manual_seed(3)
    model.train()
    model.zero_grad()
    loss_of(model, world.batch).backward()
    model.eval()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def cast(world: World) -> None:
    """A copy in another dtype computes, and its base is the base in this dtype."""
    dtype = world.rng.choice([torch.bfloat16, torch.float32, torch.float64])
    base = world.copy_of_base().to(dtype)
    batch = {key: one.to(dtype) if one.is_floating_point() else one for key, one in world.batch.items()}
    try:
        want = answers(base, batch)
    except Exception:
        return
    if not all(bool(one.isfinite().all()) for one in want):
        return
    model = world.duplicate().to(dtype)
    with disabled(model):
        world.expect_equal("disabled in another dtype", answers(model, batch), want, world.eps(dtype=dtype))
    is_other = distance(answers(model, batch), want) > 0  # what is small may vanish in bfloat16
    world.controls["adapted in another dtype"] = world.controls.get("adapted in another dtype", 0) + is_other


def autocast(world: World) -> None:
    """Under autocast the model computes and trains, and within `disabled` it is its base."""

    def under(model: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return answers(model, world.batch)

    try:
        want = under(world.base)
    except Exception:
        return
    with disabled(world.model):
        world.expect_equal("disabled under autocast", under(world.model), want, 4 * torch.finfo(torch.bfloat16).eps)
    is_other = distance(under(world.model), want) > 0
    world.controls["adapted under autocast"] = world.controls.get("adapted under autocast", 0) + is_other
    if base_trains(world, torch.bfloat16):
        world.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(world.model, world.batch)
        loss.backward()
        world.model.zero_grad()
        world.model.eval()


STEPS.update({"checkpointing": recompute, "cast": cast, "autocast": autocast})
