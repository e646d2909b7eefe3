"""Adapter parameters that learn nothing are named; those that learn, or can't by nature, are not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_roles
from lora_lightning.backbones.attach import attach
from lora_lightning.callbacks import IdleParameterGuard
from lora_lightning.callbacks.gradients import trained
from lora_lightning.errors import ConfigError
from lora_lightning.methods import BitFit, LoRA
from lora_lightning.optim import Optim
from lora_lightning.tasks import StepOutput
from tests import models
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineTask, fit

pytestmark = LIGHTNING_WARNINGS


class TwoLayers(LineTask):
    """Adapts both layers; may cut the first one off, or leave A of the second to no optimizer."""

    def __init__(self, *, cut: bool = False, forgotten: bool = False) -> None:
        super().__init__(method=LoRA(r=2, target_modules=["0", "2"]), optim=Optim(lr=0.02))
        self.cut, self.forgotten = cut, forgotten

    def compute_loss(self, batch: dict[str, Tensor]) -> StepOutput:
        hidden = self.adapted.get_submodule("0")(batch["x"])
        logits = self.adapted.get_submodule("2")(torch.tanh(hidden.detach() if self.cut else hidden))
        return StepOutput(nn.functional.cross_entropy(logits, batch["labels"]))

    def configure_optimizers(self) -> Any:
        if not self.forgotten:
            return super().configure_optimizers()
        return torch.optim.SGD([p for name, p, _ in iter_roles(self.adapted) if name != "2.lora_A"], lr=0.1)


@pytest.mark.parametrize("num_steps", [2, 10])
def test_a_layer_that_the_loss_does_not_reach_is_named(tmp_path: Path, num_steps: int) -> None:
    with pytest.warns(
        UserWarning,
        match=rf"2 of 4 trained adapter parameters had no gradient in the first {num_steps} .*'0.lora_A', '0.lora_B'\.",
    ) as caught:
        fit(tmp_path, IdleParameterGuard(num_steps), task=TwoLayers(cut=True))
    assert len([one for one in caught if "adapter parameters" in str(one.message)]) == 1


def test_what_no_optimizer_holds_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 of 4 .* exactly where they started after 2 .*: '2\.lora_A'\."):
        fit(tmp_path, IdleParameterGuard(2), task=TwoLayers(forgotten=True))


@pytest.mark.parametrize(
    ("num_steps", "task"), [(2, TwoLayers()), (10, TwoLayers()), (13, TwoLayers(cut=True))], ids=["A", "all", "short"]
)
def test_nothing_is_said_where_all_learn_or_the_run_is_short(tmp_path: Path, num_steps: int, task: TwoLayers) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter parameters.*")
        fit(tmp_path, IdleParameterGuard(num_steps), task=task)


def test_biases_of_attention_keys_are_excepted() -> None:
    model = models.build("bert")
    attach(model, BitFit())
    names = {name for name, _ in trained(model)}
    left_out = {name for name, _, _ in iter_roles(model)} - names
    assert left_out == {f"bert.encoder.layer.{layer}.attention.self.key.delta" for layer in (0, 1)}
    assert "bert.encoder.layer.0.attention.self.query.delta" in names
    attach(model := models.build("bert"), LoRA(r=2, target_modules=["key"]))
    assert {name.rpartition(".")[2] for name, _ in trained(model)} == {"lora_A", "lora_B"}


def test_one_step_is_too_few() -> None:
    with pytest.raises(ConfigError, match=r"at least 2 .*got 1"):
        IdleParameterGuard(num_steps=1)
