"""The steps of a walk: each does one thing that users do with an adapted model, and checks what must hold after it."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from lora_lightning.adapters import (
    adapter_state_dict,
    attached_methods,
    detach,
    disabled,
    is_attached,
    iter_hosts,
    load_adapter_state_dict,
)
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.checkpoint import load_adapter, write_adapter_folder
from lora_lightning.errors import UserError
from tests.fuzz import draws
from tests.fuzz.architectures import outputs
from tests.fuzz.world import Fault, Pointless, World, answers, digests, distance, nudge, shape_of

DRAWS = 8
"""Draws of methods for one model, of which the first that is not refused is attached."""
Step = Callable[[World], None]


def hang(model: Any, world: World) -> None:
    """Attach the walk's methods to a model, which then is in eval mode."""
    attach(model, world.setting.methods, train_norm_statistics=world.setting.train_norm_statistics)
    model.eval()


def start(world: World) -> None:
    """Attach; the first answer is the base's, nothing of the base trains, and a refusal leaves the model as it was."""
    before = shape_of(world.model), digests(world.model)
    try:
        hang(world.model, world)
    except UserError:
        if (shape_of(world.model), digests(world.model)) != before:
            raise Fault("a refused attach changed the model") from None
        raise
    if not any(parameter.requires_grad for parameter in world.model.parameters()):
        raise Fault("nothing trains")
    got, want = answers(world.model, world.batch), answers(world.base, world.batch)
    if world.setting.starts_at_base:
        world.expect_equal("the first forward is not the base's", got, want, world.tolerance())
    calibrate(world)


def begin(world: World) -> None:
    """Attach what is drawn, after some refusals something else, and train it.

    Raises:
        UserError: All draws were refused.
    """
    for left in reversed(range(DRAWS)):
        world.setting = draws.draw(world.base, world.rng)
        try:
            start(world)
        except UserError as error:
            world.refused(f"attach {world.setting}", error)
            if not left:
                raise
        else:
            break
    world.path.append(f"[{world.setting}]")
    if base_draws(world):
        raise Pointless
    train(world)


def base_draws(world: World) -> bool:
    """Return whether the base itself, called with as many more tokens as there are virtual ones, draws at random.

    Reformer draws the hashes of rows that are longer than a chunk anew in each call, so that no two are the same.
    """
    num = sum(getattr(method, "num_virtual_tokens", 0) for method in world.setting.methods)
    ids = world.batch.get("input_ids")
    if not num or ids is None:
        return False
    before = torch.get_rng_state()
    try:
        answers(world.base, {**world.batch, "input_ids": torch.cat([ids[:, :1].expand(-1, num), ids], 1)})
    except Exception:
        return False  # which the model with its prompt must not follow
    return not torch.equal(before, torch.get_rng_state())


def calibrate(world: World) -> None:
    """Let the methods look at data, as a task does."""
    if not base_trains(world):
        return
    world.model.train()
    for method in attached_methods(world.model):
        if method.calibrates:
            method.calibrate(world.model, [world.batch], lambda batch: loss_of(world.model, batch))
    world.model.eval()


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return a loss that every output tensor that can train has a part in."""
    found = outputs(model, batch)
    if torch.is_grad_enabled():
        found = [one for one in found if one.requires_grad]
    if not found:
        raise Fault("no output depends on what trains")
    return torch.stack([one.float().square().mean() for one in found]).sum()


def train(world: World) -> None:
    """Take a few steps; the base does not move, and the answer does."""
    model, before = world.model, answers(world.model, world.batch)
    if not base_trains(world):
        nudge(model, world.rng.randrange(1000))
        return
    world.seed()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not hosts_have_a_part(world):
        raise Pointless
    optimizer = torch.optim.AdamW(trained, lr=world.rng.choice([1e-3, 1e-2]))
    total = world.rng.choice([1, 2, 4])
    for step in range(total):
        loss = loss_of(model, world.batch)
        for method in attached_methods(model):
            extra = method.extra_loss(model)
            loss = loss if extra is None else loss + extra
        loss.backward()
        for method in attached_methods(model):
            method.before_step(model, step, total)
        optimizer.step()
        optimizer.zero_grad()
        for method in attached_methods(model):
            method.after_step(model, step, total)
    model.eval()
    nudge(model, world.rng.randrange(1000))
    after = answers(model, world.batch)
    if distance(after, before) == 0.0 and not hosts_move_the_base(world):
        raise Pointless
    world.expect_other("what was trained", after, before)


@torch.no_grad()
def hosts_move_the_base(world: World) -> bool:
    """Return whether what adapters may do to their hosts is seen in the base's outputs, above their rounding."""
    base = world.copy_of_base()
    for path, _ in iter_hosts(world.model):
        for parameter in base.get_submodule(path).parameters():
            parameter.mul_(1.05)
    return distance(answers(base, world.batch), answers(world.base, world.batch)) > world.eps()


def hosts_have_a_part(world: World) -> bool:
    """Return whether the outputs of the base depend on the modules that have adapters."""
    base = world.copy_of_base().train().requires_grad_(requires_grad=False)
    for path, _ in iter_hosts(world.model):
        base.get_submodule(path).requires_grad_()
    found = [one for one in outputs(base, world.batch) if one.requires_grad]
    if not found:
        return False
    torch.stack([one.float().square().mean() for one in found]).sum().backward()
    return any(bool(one.grad.any()) for one in base.parameters() if one.grad is not None)


def base_trains(world: World, dtype: torch.dtype | None = None) -> bool:
    """Return whether the base itself trains on the batch, under autocast to `dtype` if one is given."""
    base = world.copy_of_base().train().requires_grad_()
    try:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_of(base, world.batch)
        loss.backward()
    except Exception:
        return False
    return True


def base_is_unchanged(world: World) -> None:
    """Compare the base's parameters and persistent buffers, under their own names, by hash."""
    found = digests(world.model)
    moved = [name for name, digest in digests(world.base).items() if found.get(name) != digest]
    if moved:
        raise Fault(f"the base moved: {len(moved)} tensors, such as {moved[0]}")


def disable(world: World) -> None:
    """Within `disabled` the model answers as its base, and after it as before."""
    want = answers(world.model, world.batch)
    with disabled(world.model):
        bare = answers(world.model, world.batch)
    world.expect_equal("disabled", bare, answers(world.base, world.batch), world.eps())
    world.expect_equal("after disabled", answers(world.model, world.batch), want)
    world.expect_other("adapted and base", want, bare)


def reload(world: World) -> None:
    """The adapters' state, loaded into a new model after a reseed, gives the same answers to the bit."""
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(world.model).items()}
    extra = [method.extra_state(world.model) for method in attached_methods(world.model)]
    world.seed()
    other = world.copy_of_base()
    hang(other, world)
    want = answers(world.model, world.batch)
    world.expect_other("a new model before loading", answers(other, world.batch), want)
    load_adapter_state_dict(other, state)
    for method, own in zip(attached_methods(other), extra, strict=True):
        method.load_extra_state(other, own)
    world.expect_equal("reloaded", answers(other, world.batch), want)
    if world.rng.random() < 0.5:
        world.model = other


def folder(world: World) -> None:
    """The adapter folder, loaded into a new model, gives the same answers to the bit."""
    path = world.new_folder()
    write_adapter_folder(path, world.model)
    world.seed()
    other = world.copy_of_base()
    hang(other, world)
    load_adapter(other, path)
    world.expect_equal("adapter folder", answers(other, world.batch), answers(world.model, world.batch))


def duplicate(world: World) -> None:
    """A deep copy and a pickled copy answer alike; what is done to them does not reach the model."""
    want = answers(world.model, world.batch)
    is_pickled = world.rng.random() < 0.5 and can_be_pickled(world.base)
    other = pickled(world.model) if is_pickled else world.duplicate()
    world.expect_equal("copy", answers(other, world.batch), want)
    nudge(other, 1)
    world.expect_other("a moved copy", answers(other, world.batch), want)
    world.expect_equal("after moving a copy", answers(world.model, world.batch), want)


def pickled(model: Any) -> Any:
    """Return a model from its pickle."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def can_be_pickled(base: Any) -> bool:
    """Return whether the base itself can, which those with parametrized modules and some hooks cannot."""
    try:
        pickled(base)
    except Exception:
        return False
    return True


def take_off(world: World) -> None:
    """After `detach` a model is its base again, in class, hooks, flags, names and answers."""
    other = world.duplicate()
    detach(other)
    if is_attached(other):
        raise Fault("detach left adapters")
    if shape_of(other) != shape_of(world.base):
        raise Fault("detach left traces")
    world.expect_equal("detached", answers(other, world.batch), answers(world.base, world.batch), world.eps(other))


def fold_in(world: World) -> None:
    """Merging gives the adapted answers, in memory and after `save_pretrained` and `from_pretrained`."""
    merged = world.duplicate()
    merge(merged)
    if is_attached(merged):
        raise Fault("merge left adapters")
    left = [type(one).__name__ for one in merged.modules() if "Adapted" in type(one).__name__]
    if left:
        raise Fault(f"merge left {left[0]}")
    got, want = answers(merged, world.batch), answers(world.model, world.batch)
    world.expect_equal("merged", got, want, merge_tolerance(world))
    world.expect_other("merged and base", got, answers(world.base, world.batch))
    again, base_off = saved_and_loaded(world, merged)
    if again is not None:
        within = max(2 * world.eps(), 20 * base_off)  # what the base loses in some kernels
        world.expect_equal("merged, saved and loaded", answers(again, world.batch), got, within)


def merge_tolerance(world: World) -> float:
    """Return what rounding each merged weight once to the base's dtype may do."""
    dtype = next(world.base.parameters()).dtype
    return max(world.tolerance(), 400 * torch.finfo(dtype).eps)


def saved_and_loaded(world: World, model: Any) -> tuple[Any, float]:
    """Return a model from where it was saved, None where the base does not come back, and how far the base is off."""
    dtype = next(world.base.parameters()).dtype

    def through_disk(one: Any) -> Any:
        path = world.new_folder()
        one.save_pretrained(path)
        return type(one).from_pretrained(path, dtype=dtype).eval()

    try:
        came_back = through_disk(world.copy_of_base())
        base_off = distance(answers(came_back, world.batch), answers(world.base, world.batch))
    except Exception:
        return None, 0.0
    return through_disk(model) if base_off <= 1e-6 else None, base_off


def again(world: World) -> None:
    """Take the adapters off, and attach what another draw gives."""
    detach(world.model)
    begin(world)


def onto_merged(world: World) -> None:
    """Merge, and attach the same once more to what came of it."""
    merge(world.model)
    world.base = copy.deepcopy(world.model)
    start(world)
    train(world)


def whole_state(world: World) -> None:
    """The state of the whole model, base and adapters, loads into another model with the same methods."""
    if any(method.calibrates for method in attached_methods(world.model)):
        return  # what they share is known to the adapters' state alone
    world.seed()
    other = world.copy_of_base()
    hang(other, world)
    want = answers(world.model, world.batch)
    world.expect_other("a new model before loading all", answers(other, world.batch), want)
    other.load_state_dict(world.model.state_dict())
    world.expect_equal("loaded as a whole", answers(other, world.batch), want)


STEPS: dict[str, Step] = {
    "disable": disable,
    "reload": reload,
    "folder": folder,
    "copy": duplicate,
    "detach": take_off,
    "merge": fold_in,
    "train": train,
    "again": again,
    "onto merged": onto_merged,
    "whole state": whole_state,
}


def quiet() -> None:
    """Turn off warnings and progress bars, of which each architecture has its own."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
