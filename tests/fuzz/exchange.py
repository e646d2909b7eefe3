"""Steps that another library or a call of another form takes part in: PEFT, padding, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from lora_lightning.checkpoint import export_peft, load_peft
from lora_lightning.errors import UserError
from tests.fuzz.architectures import is_text
from tests.fuzz.steps import STEPS, merge_tolerance
from tests.fuzz.world import Fault, World, answers, distance
from tests.prompts import oracle

GENERATED = 4
THEIR_ROUNDING = 1e-5
"""PEFT computes in float32 also where the base is of a wider dtype."""


def main(found: list[Tensor]) -> list[Tensor]:
    """Return the first output alone, which every library's model gives alike."""
    return found[:1]


def export(world: World) -> None:
    """PEFT reads what is exported, and so does this library; both answer as the model does."""
    path = world.new_folder()
    export_peft(world.model, path)
    want, within = main(answers(world.model, world.batch)), max(merge_tolerance(world), THEIR_ROUNDING)
    ours = world.copy_of_base()
    load_peft(ours, path)
    world.expect_equal("export read by load_peft", main(answers(ours.eval(), world.batch)), want, within)
    try:
        got = main(answers(peft.PeftModel.from_pretrained(world.copy_of_base(), path).eval(), world.batch))
    except Exception:
        if peft_takes_it(world, path):
            raise
        return
    if got[0].dim() == 3 and want[0].dim() == 3:
        got = [got[0][:, -want[0].shape[1] :]]  # behind PEFT's virtual tokens
    if not distance(got, want) <= within and peft_takes_it(world, path):
        world.expect_equal("export read by PEFT", got, want, within)
    bare = main(answers(world.base, world.batch))
    world.controls["export and base"] = world.controls.get("export and base", 0) + (distance(want, bare) > 0)


def peft_takes_it(world: World, path: Path) -> bool:
    """Return whether PEFT trains, writes and reads an adapter of its own with the same config."""
    config = peft.PeftConfig.from_pretrained(path)
    config.inference_mode = False
    if config.peft_type == "LORA":
        config.task_type = None
    try:
        theirs = peft.get_peft_model(world.copy_of_base(), config).eval()
        _move(theirs)
        folder = world.new_folder()
        theirs.save_pretrained(folder)
        back = peft.PeftModel.from_pretrained(world.copy_of_base(), folder).eval()
        return distance(answers(back, world.batch), answers(theirs, world.batch)) == 0.0
    except Exception:
        return False


def load(world: World) -> None:
    """What PEFT trained and wrote is read, and answers as PEFT's model does."""
    try:
        theirs = peft.get_peft_model(world.copy_of_base(), _their_config(world)).eval()
        _move(theirs)
        want = main(answers(theirs, world.batch))
        path = world.new_folder()
        theirs.save_pretrained(path)
        back = peft.PeftModel.from_pretrained(world.copy_of_base(), path).eval()
        if distance(main(answers(back, world.batch)), want) > 0:
            return  # PEFT's own file does not hold what it trained
    except Exception:
        return  # PEFT does not take this
    ours = world.copy_of_base()
    try:
        load_peft(ours, path)
    except UserError:
        if digests_differ(ours, world):
            raise Fault("a refused load_peft changed the model") from None
        raise
    world.expect_equal(
        "PEFT's file", main(answers(ours.eval(), world.batch)), want, max(merge_tolerance(world), THEIR_ROUNDING)
    )


def digests_differ(model: Any, world: World) -> bool:
    """Return whether a model is no longer its base."""
    return distance(answers(model, world.batch), answers(world.base, world.batch)) > 0


def _their_config(world: World) -> Any:
    from tests.fuzz.draws import Names

    rng, names = world.rng, Names(world.base, world.rng)
    targets = names.targets() or "all-linear"
    kind = rng.choice(["lora", "lora", "lora", "adalora", "vera", "ia3", "tokens"])
    if kind == "tokens":
        return peft.TrainableTokensConfig(token_indices=[5, 9, 11])
    if kind == "adalora":
        return peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=targets)
    if kind == "vera":
        return peft.VeraConfig(r=4, target_modules=targets, projection_prng_key=rng.randrange(9))
    if kind == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=[])
    settings: dict[str, Any] = {"r": rng.choice([1, 4, 40]), "lora_alpha": rng.choice([1, 8])}
    settings |= {"use_rslora": rng.random() < 0.3, "use_dora": rng.random() < 0.3}
    settings |= {"bias": rng.choice(["none", "none", "all", "lora_only"]), "lora_bias": rng.random() < 0.2}
    if settings["lora_bias"]:
        settings["bias"] = "none"
    if rng.random() < 0.3:
        settings["modules_to_save"] = [names.suffix(names.any[-3:])]
    if rng.random() < 0.2:
        settings["rank_pattern"] = {names.suffix(names.linear): 3}
    if names.experts and rng.random() < 0.3:
        settings["target_parameters"] = [f"{names.suffix(names.experts)}.gate_up_proj"]
    return peft.LoraConfig(target_modules=targets, **settings)


@torch.no_grad()
def _move(model: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype))


@torch.no_grad()
def padding(world: World) -> None:
    """A padded row answers as it does alone, padded on either side, wherever the base's does."""
    if not is_text(world.architecture) or "input_ids" not in world.batch:
        return
    for layout in ("right", "left"):
        ids, mask = oracle.rows(world.base, layout)
        try:
            base_off = _padded_gap(world.base, ids, mask)
        except Exception:
            continue
        if base_off > 1e-5:
            continue
        off = _padded_gap(world.model, ids, mask)
        if off > max(1e-4, world.tolerance()):
            raise Fault(f"padded {layout}: off by {off:.1e}, the base by {base_off:.1e}")
        blind = _gap_at(oracle.call(world.model, ids, mask), oracle.call(world.model, ids, torch.ones_like(mask)), mask)
        world.controls["padding without a mask"] = world.controls.get("padding without a mask", 0) + (blind > 1e-4)


def _padded_gap(model: Any, ids: Tensor, mask: Tensor) -> float:
    """Return how far the padded second row is from the same row alone."""
    real = mask[1].bool()
    together = oracle.call(model, ids, mask)
    alone_ids = ids[1:, real]
    alone = oracle.call(model, alone_ids, torch.ones_like(alone_ids))
    if together.dim() == 3 and together.shape[1] == ids.shape[1]:
        return distance([together[1, real]], [alone[0]])
    return distance([together[1]], [alone[0]])


def _gap_at(one: Tensor, other: Tensor, mask: Tensor) -> float:
    if one.dim() == 3 and one.shape[1] == mask.shape[1]:
        return distance([one[1, mask[1].bool()]], [other[1, mask[1].bool()]])
    return distance([one[1]], [other[1]])


@torch.no_grad()
def generation(world: World) -> None:
    """Generated tokens, and their scores, are the same with a cache and without, wherever the base's are."""
    if not is_text(world.architecture) or not hasattr(world.base, "generate"):
        return
    layout = world.rng.choice(["whole", "left"])
    ids, mask = oracle.rows(world.base, layout)
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": GENERATED, "min_new_tokens": GENERATED}
    given |= {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    if oracle.takes_decoder_ids(world.base):
        given["decoder_start_token_id"] = 1

    def off(model: Any) -> float:
        cached, plain = (model.generate(ids, use_cache=cache, **given).logits for cache in (True, False))
        return distance(list(cached), list(plain))

    try:
        if off(world.base) > 1e-4:
            return
    except Exception:
        return
    found = off(world.model)
    if found > max(1e-3, world.tolerance()):
        raise Fault(f"cached generation: off by {found:.1e}")
    world.controls["generation"] = world.controls.get("generation", 0) + 1


STEPS.update({"export": export, "import": load, "padding": padding, "generation": generation})
