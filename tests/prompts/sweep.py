"""Every small model with a prompt or a prefix: is it accepted, does the oracle hold, do gradients and caches work?

`python -m tests.prompts.sweep` writes the table of docs/prompts.md, which the slow test compares.
"""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_lightning.adapters import Method
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import UserError
from lora_lightning.methods import PromptTuning, PTuningV2
from tests import models
from tests.prompts import oracle, zoo

TABLE = Path(__file__).parents[2] / "docs" / "prompts.md"
LANGUAGE = ("causal", "masked", "seq2seq")
NUM = len(oracle.FRONT)
TOLERANCE = 1e-5


@dataclass
class Verdict:
    """What came of one model with one method.

    Args:
        name: The model type.
        kind: The head, a key of `zoo.KINDS`.
        refusal: Why the library refused it; empty where it did not.
        faults: What is wrong, in words; empty where nothing is.
    """

    name: str
    kind: str
    refusal: str = ""
    faults: list[str] = field(default_factory=list)


def built(name: str, kind: str) -> Any:
    """Return a small model that computes, None where the shared settings make none (a matter of its config)."""
    if name not in zoo.KINDS[kind][1]:
        return None
    try:
        base = zoo.build(name, kind)
        with torch.no_grad():
            oracle.call(base, *oracle.rows(base, "whole"))
    except Exception:  # any config of 250 model types
        return None
    return base


def judge(base: Any, name: str, kind: str, method: Method) -> Verdict:
    """Attach a method to a copy of a model, and look at everything that it must do."""
    verdict = Verdict(name, kind)
    model = copy.deepcopy(base)
    try:
        attach(model, method)
    except UserError as error:
        verdict.refusal = str(error)
        return verdict
    try:
        verdict.faults = prompt_faults(base, model) if isinstance(method, PromptTuning) else prefix_faults(base, model)
        verdict.faults += gradient_faults(base, model) + (
            cache_faults(base, model) if kind in ("causal", "seq2seq") else []
        )
    except Exception as error:  # whatever is raised is a finding
        verdict.faults = [f"{type(error).__name__}: {error}"]
    return verdict


def prompt_faults(base: Any, model: Any) -> list[str]:
    """Return where a prompt with the embeddings of tokens is not these tokens in front, and where others are."""
    oracle.hold(model, base, oracle.FRONT)
    # What pools a row into one vector, as a classifier on an encoder does, takes the first real token, by design.
    pools = oracle.call(base, *oracle.rows(base, "whole")).dim() < 3
    gaps = {} if pools else oracle.gaps(base, model)
    faults = [f"{layout} rows are off by {gap:.0e}" for layout, gap in gaps.items() if gap > TOLERANCE]
    oracle.hold(model, base, oracle.OTHER_FRONT)
    others = oracle.gaps(base, model, ("whole",))
    return faults + [f"another prompt is off by {gap:.0e} only" for gap in others.values() if gap <= 10 * TOLERANCE]


@torch.no_grad()
def prefix_faults(base: Any, model: Any) -> list[str]:
    """Return whether a prefix changes nothing, or minds padding where the base does not."""
    ids, mask = oracle.rows(base, "whole")
    models.perturb(model, std=1.0)
    faults = []
    if models.gap(oracle.call(model, ids, mask), oracle.call(base, ids, mask)) == 0:
        faults.append("a prefix has no effect")
    if padding_gap(base) <= TOLERANCE < padding_gap(model):
        faults.append(f"padding changes tokens by {padding_gap(model):.0e}")
    return faults


def padding_gap(model: Any) -> float:
    """Return how far the same tokens are from each other, padded right and padded left."""
    ids, mask = oracle.rows(model, "right")
    left_ids, left_mask = (one.clone() for one in (ids, mask))
    left_ids[1], left_mask[1] = ids[1].roll(2), mask[1].roll(2)
    right, left = oracle.call(model, ids, mask), oracle.call(model, left_ids, left_mask)
    if right.shape[:2] != ids.shape:
        return models.gap(left, right)
    return models.gap(left[left_mask.bool()], right[mask.bool()])


def gradient_faults(base: Any, model: Any) -> list[str]:
    """Return the trainable parameters that no gradient reaches, where the base has gradients in evaluation mode."""
    rows = oracle.rows(model, "right")
    try:
        oracle.call(base, *rows).square().sum().backward()
    except (AssertionError, RuntimeError):  # Reformer wants training mode, RWKV updates its state in place
        return []
    base.zero_grad()
    oracle.call(model, *rows).square().sum().backward()
    trained = [(name, one.grad) for name, one in model.named_parameters() if one.requires_grad]
    idle = [name for name, gradient in trained if gradient is None or not gradient.any()]
    return [f"no gradient reaches {name}" for name in idle]


@torch.no_grad()
def cache_faults(base: Any, model: Any) -> list[str]:
    """Return where generation with a cache is another than without, and the base's is not."""
    ids, _ = oracle.rows(base, "whole")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if oracle.takes_decoder_ids(base):
        settings["decoder_start_token_id"] = 1

    def is_same(one: Any) -> bool:
        cached, uncached = (one.generate(ids, use_cache=cache, **settings) for cache in (True, False))
        return torch.equal(cached, uncached)

    try:
        if not is_same(base):
            return []
    except Exception:  # some bases do not generate
        return []
    try:
        return [] if is_same(model) else ["generation with a cache is another than without"]
    except UserError:  # refused in a sentence
        return []


def run(kinds: tuple[str, ...], method: Method) -> list[Verdict]:
    """Return the verdicts on all model types."""
    found = []
    for name in zoo.names():
        for kind in kinds:
            base = built(name, kind)
            if base is not None:
                found.append(judge(base, name, kind, method))
    return found


def lines(prompts: list[Verdict], prefixes: list[Verdict]) -> list[str]:
    """Return the table: each model type with what takes it, or the reason."""
    rows = []
    for name in sorted({one.name for one in prompts}):
        cells = [cell([one for one in verdicts if one.name == name]) for verdicts in (prompts, prefixes)]
        rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return rows


def cell(verdicts: list[Verdict]) -> str:
    """Return `yes`, or why every head, or some, is refused."""
    refused = [one for one in verdicts if one.refusal]
    if not refused:
        return "yes"
    reason = reason_of(refused[0].refusal)
    return reason if len(refused) == len(verdicts) else f"yes; {', '.join(one.kind for one in refused)}: {reason}"


def reason_of(refusal: str) -> str:
    """Return the reason in a refusal, without its first and last words."""
    return refusal.partition(": ")[2].partition(" Use ")[0].rstrip(".")


def write() -> None:
    """Write the table into the docs, under what stands above it."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    text = TABLE.read_text(encoding="utf-8")
    head, mark, _ = text.partition("|---|---|---|\n")
    found = [
        run(LANGUAGE, method) for method in (PromptTuning(num_virtual_tokens=NUM), PTuningV2(num_virtual_tokens=NUM))
    ]
    TABLE.write_text(head + mark + "\n".join(lines(*found)) + "\n", encoding="utf-8")
    for verdict in (one for verdicts in found for one in verdicts if one.faults):
        sys.stdout.write(f"{verdict}\n")


if __name__ == "__main__":
    write()
