"""What a task of a user's own returns is checked before it reaches Lightning, which says nothing about its cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning import LoRA, StepOutput
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.step_output import require_output
from tests.tasks.toys import Tagger, loader, trainer

METHOD = LoRA(r=2, target_modules=["linear1"])


def loss_of(task: Tagger, batch: Any, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(task.adapted(batch[0]), batch[1], reduction=reduction)


class Bare(Tagger):
    def compute_loss(self, batch: Any) -> Any:
        return loss_of(self, batch)


class Nothing(Tagger):
    def compute_loss(self, batch: Any) -> Any:
        loss_of(self, batch)


class PerRow(Tagger):
    def compute_loss(self, batch: Any) -> StepOutput:
        return StepOutput(loss_of(self, batch, "none"))


class Number(Tagger):
    def compute_loss(self, batch: Any) -> Any:
        return StepOutput(loss_of(self, batch).item())


class Detached(Tagger):
    def compute_loss(self, batch: Any) -> StepOutput:
        return StepOutput(loss_of(self, batch).detach())


class Right(Tagger):
    def compute_loss(self, batch: Any) -> StepOutput:
        return StepOutput(loss_of(self, batch))

    def configure_metrics(self) -> None:
        """Measure nothing."""


WRONG = [
    (Bare, r"^compute_loss of Bare must return a StepOutput, .*; got a tensor of shape \[\]\.$"),
    (Nothing, r"^compute_loss of Nothing must return a StepOutput, .*; got None\.$"),
    (PerRow, r"^compute_loss of PerRow must return one number as the loss, .*; got a tensor of shape \[16\]\.$"),
    (Number, r"^compute_loss of Number must return one number as the loss, .*; got a float\.$"),
]


@pytest.mark.parametrize(("task", "message"), [*WRONG, (Detached, "depends on no parameter that trains")])
def test_a_fit_refuses_it(task: type[Tagger], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(max_steps=1).fit(task(method=METHOD), loader(16))


@pytest.mark.parametrize(("task", "message"), WRONG)
def test_an_evaluation_refuses_it(task: type[Tagger], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer().validate(task(method=METHOD), loader(16), verbose=False)


def test_what_is_right_passes() -> None:
    run = trainer(max_steps=1)
    run.fit(Right(method=METHOD), loader(16), loader(16))
    assert run.global_step == 1


def test_a_loss_without_gradient_is_measured_but_not_minimized() -> None:
    output = StepOutput(torch.tensor(1.0))
    assert require_output(output, "Task", trains=False) is output
    with pytest.raises(ConfigError, match="nothing would be learned"):
        require_output(output, "Task", trains=True)


@pytest.mark.parametrize("model", [None, [nn.Linear(2, 2)], nn.Linear])
def test_a_backbone_must_be_a_module(model: Any) -> None:
    class Wrong(Tagger):
        def configure_backbone(self) -> Any:
            return model

    with pytest.raises(ConfigError, match=r"configure_backbone of Wrong returned \w+; return the model to adapt"):
        Wrong(method=METHOD).configure_model()
    Right(method=METHOD).configure_model()
