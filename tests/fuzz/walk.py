"""One case: an architecture, what is attached to it, and a walk of steps; everything is drawn from one seed."""

from __future__ import annotations

import copy
import random
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_lightning.errors import UserError
from tests import models
from tests.fuzz import architectures, exchange, regimes
from tests.fuzz.architectures import Architecture, UnbuildableError, vary
from tests.fuzz.steps import STEPS, base_is_unchanged, begin
from tests.fuzz.world import Pointless, World

_ = exchange, regimes  # which add their steps
DTYPES = (torch.float32,) * 4 + (torch.float64, torch.bfloat16)


@dataclass
class Verdict:
    """What came of one case.

    Args:
        seed: Seed of the campaign.
        case: Number of the case in it.
        description: What was drawn.
        fault: What is wrong, in a line; empty where nothing is.
        trace: Where it was raised.
        refusals: What the library refused, and why.
        controls: How often each negative control was seen to differ.
        steps: The steps that were taken.
    """

    seed: int
    case: int
    description: str = ""
    fault: str = ""
    trace: str = ""
    refusals: list[tuple[str, str]] = field(default_factory=list)
    controls: Counter[str] = field(default_factory=Counter)
    steps: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"--seed {self.seed} --case {self.case}: {self.description}: {self.fault or 'holds'}"


def run(seed: int, case: int) -> Verdict:
    """Run one case."""
    rng = random.Random(f"{seed}:{case}")
    verdict = Verdict(seed, case)
    architecture, dtype, base, batch = _drawn_base(rng)
    walk = rng.sample(sorted(STEPS), rng.choice([3, 4, 6]))
    with tempfile.TemporaryDirectory() as folder:
        world = World(architecture, base, batch, rng, Path(folder), copy.deepcopy(base))
        try:
            _walk(world, walk)
        except Exception as error:  # whatever is raised is a finding
            verdict.fault = f"{type(error).__name__}: {str(error)[:600]}"
            verdict.trace = traceback.format_exc()
    taken = ", ".join(world.path)
    verdict.description = f"{architecture} {str(dtype).removeprefix('torch.')} {taken} [{world.setting}]"
    verdict.refusals, verdict.controls, verdict.steps = world.refusals, Counter(world.controls), world.path
    return verdict


def _walk(world: World, walk: list[str]) -> None:
    """Attach, train, and take the steps; a refusal ends the step, or the walk where nothing is attached after it."""
    try:
        begin(world)
        base_is_unchanged(world)
    except UserError as error:
        world.refused("begin", error)
        return
    except Pointless:
        return
    for name in walk:
        world.path.append(name)
        try:
            STEPS[name](world)
        except UserError as error:
            world.refused(name, error)
            if name in ("again", "onto merged"):
                return
        except Pointless:
            return
        base_is_unchanged(world)


def _drawn_base(rng: random.Random) -> tuple[Architecture, torch.dtype, object, architectures.Batch]:
    """Draw until an architecture builds and computes."""
    while True:
        pool = KNOWN if rng.random() < 0.25 else BY_KIND[rng.choice(sorted(BY_KIND))]
        architecture, dtype = rng.choice(pool), rng.choice(DTYPES)
        try:
            base, batch = architectures.build(architecture, dtype)
            vary(base, batch, rng)
        except UnbuildableError:
            continue
        return architecture, dtype, base, batch


POOL = architectures.every()
BY_KIND = {kind: [one for one in POOL if one.kind == kind] for kind in {one.kind for one in POOL}}
KNOWN = [one for one in POOL if one.name in {*models.ARCHITECTURES, *models.RELATIVES, *models.MIXTURES, "gemma3_text"}]
"""Those whose usual targets are known by name, for which all methods are made."""
