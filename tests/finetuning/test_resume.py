"""Runs of existing modules, stopped after any batch, resume bit for bit: one optimizer, several, automatic, manual."""

from __future__ import annotations

import pytest
import torch

from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.finetuning.modules import NUM_BATCHES, Gan, SelfSupervised
from tests.finetuning.runs import MODULES, fit, same, trained_state
from tests.resume.runs import SaveAfter

pytestmark = LIGHTNING_WARNINGS
STOPS = (2, 4, NUM_BATCHES, 10)


@pytest.mark.parametrize("cls", MODULES)
def test_a_stopped_run_goes_on_exactly(cls, tmp_path):
    module, whole = fit(cls, SaveAfter(tmp_path, STOPS))
    end = trained_state(module)
    for stop in STOPS:
        resumed, rest = fit(cls, seed=99, ckpt_path=tmp_path / f"{stop}.ckpt")
        assert rest.by_batch == {number: loss for number, loss in whole.by_batch.items() if number > stop}
        assert same(trained_state(resumed), end)
    other, _ = fit(cls, seed=99)
    assert not same(trained_state(other), end)


def test_gradients_that_await_a_step_are_kept(tmp_path):
    """The module accumulates three batches by itself, over the end of an epoch too."""
    module, _ = fit(SelfSupervised, SaveAfter(tmp_path, (2, 3, NUM_BATCHES)))
    held = {
        stop: torch.load(tmp_path / f"{stop}.ckpt", weights_only=True)["exact_resume"]["ranks"][0]["unfinished"]
        for stop in (2, 3, NUM_BATCHES)
    }
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert held[3] is None
    assert held[2]["gradients"].keys() == held[NUM_BATCHES]["gradients"].keys() == trained
    content = torch.load(tmp_path / "2.ckpt", weights_only=True)
    content["exact_resume"]["ranks"][0]["unfinished"] = None
    torch.save(content, tmp_path / "without.ckpt")
    resumed, _ = fit(SelfSupervised, seed=99, ckpt_path=tmp_path / "without.ckpt")
    assert not same(trained_state(resumed), trained_state(module))


def test_gradients_of_a_finished_step_are_not_kept(tmp_path, monkeypatch):
    def stays(self, set_to_none=True):
        """Leave the gradients."""

    monkeypatch.setattr(torch.optim.Adam, "zero_grad", stays)
    module, _ = fit(Gan, SaveAfter(tmp_path, (2,)), limit_train_batches=2, max_epochs=1)
    assert all(parameter.grad is not None for parameter in module.discriminator.parameters())
    content = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert content["exact_resume"]["ranks"][0]["unfinished"] is None
