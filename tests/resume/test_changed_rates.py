"""Resuming with other rates, another schedule or another optimizer."""

from __future__ import annotations

import warnings

import pytest
import torch

from lora_lightning import LoRA, Optim
from lora_lightning.errors import CheckpointError
from tests.resume.runs import Reader, SaveAfter, Tokens, fit

METHOD = LoRA(r=2, dropout=0.2, target_modules=["2", "5"])
OLD = {"lr": 0.05, "schedule": "linear", "warmup": 2, "lora_plus_ratio": 4.0, "weight_decay": 0.1}
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Rates(SaveAfter):
    """Notes rates and weight decay of each step."""

    def __init__(self, folder, batches=()):
        super().__init__(folder, batches)
        self.seen = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        groups = optimizer.param_groups
        self.seen[trainer.global_step] = [(group["lr"], group["weight_decay"]) for group in groups]


def run(folder, batches=(), ckpt=None, seed=11, **optim):
    rates = Rates(folder, batches)
    trace, weights = fit(Reader(METHOD, Optim(**{**OLD, **optim})), Tokens(), rates, ckpt_path=ckpt, seed=seed)
    return trace, weights, rates.seen


@pytest.mark.parametrize("stop", [1, 6, 11])
def test_changed_rates_are_taken_from_the_next_step_on(tmp_path, stop):
    run(tmp_path, [stop])
    other = {"lr": 0.01, "schedule": "cosine", "weight_decay": 0.0, "lora_plus_ratio": 2.0}
    whole = run(tmp_path / "other", **other)[2]
    with pytest.warns(UserWarning, match=r"optim\.lr 0\.01 \(before: 0\.05\).*no longer the run that was stopped"):
        resumed = run(tmp_path, ckpt=tmp_path / f"{stop}.ckpt", seed=99, **other)[2]
    assert sorted(resumed) == list(range(stop, 21))
    assert resumed == {step: groups for step, groups in whole.items() if step >= stop}
    assert resumed != {step: groups for step, groups in run(tmp_path / "old")[2].items() if step >= stop}


def test_unchanged_rates_resume_bit_for_bit_without_a_word(tmp_path):
    full = run(tmp_path, [6])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Resumed with")
        resumed = run(tmp_path, ckpt=tmp_path / "6.ckpt", seed=99)
    assert resumed[2] == {step: groups for step, groups in full[2].items() if step >= 6}
    assert all(torch.equal(weight, resumed[1][name]) for name, weight in full[1].items())


def test_weight_decay_that_divides_the_groups_is_refused(tmp_path):
    head = LoRA(r=2, target_modules=["2"], modules_to_save=["5"])  # a head's bias gets no decay, its weight does
    fit(Reader(head, Optim(**OLD)), Tokens(), SaveAfter(tmp_path, [6]))
    without = Reader(head, Optim(**{**OLD, "weight_decay": 0.0}))
    with pytest.raises(
        CheckpointError, match=r"optim\.weight_decay=0\.1.*0\.0: weight decay puts vectors into a group"
    ):
        fit(without, Tokens(), SaveAfter(tmp_path, []), ckpt_path=tmp_path / "6.ckpt")


def test_another_optimizer_is_refused(tmp_path):
    run(tmp_path, [6])
    with pytest.raises(CheckpointError, match=r"optim\.optimizer='AdamW'.*'SGD'.*model\.init_args\.adapter"):
        run(tmp_path, ckpt=tmp_path / "6.ckpt", optimizer="SGD")
