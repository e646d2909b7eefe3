"""Tasks whose loss is a mean over supervised tokens, exact over accumulated batches and ranks."""

from __future__ import annotations

import abc
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.checks.monitors import Direction
from lora_lightning.tasks.base import AdapterTask
from lora_lightning.tasks.evaluation import EvaluationSets
from lora_lightning.tasks.settings import labels
from lora_lightning.tasks.step_output import StepOutput
from lora_lightning.tasks.token_loss import TokenSums

__all__ = ["PerTokenTask"]

_UNIT = 1024.0
"""Backward starts from the sum over this many tokens, so that gradients stay in half precision's range."""


@dataclass
class _Totals:
    """Token sums over many batches, on the device, so that adding does not synchronize with the host."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    num_right: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    num_tokens: int = 0

    def plain(self) -> dict[str, Any]:
        return {"loss": self.loss.cpu(), "num_right": self.num_right.cpu(), "num_tokens": self.num_tokens}

    def add(self, sums: TokenSums) -> None:
        loss = sums.loss.detach()
        wide = loss if loss.device.type == "mps" else loss.double()  # which has no float64
        self.loss = self.loss.to(wide) + wide
        self.num_right = self.num_right.to(sums.num_right.device) + sums.num_right
        self.num_tokens += sums.num_tokens


class PerTokenTask(AdapterTask, abc.ABC):
    """A task whose loss is the mean over supervised tokens; subclass it and define `token_sums`.

    Batches hold different numbers of supervised tokens, so the mean of the means of micro-batches or ranks is not the
    mean over the tokens of an optimizer step. Here backward runs on sums, and the gradients are divided by the number
    of tokens of the whole step on all ranks, just before clipping and the optimizer step. The gradients of the methods'
    penalties are added then, once. A step without supervised tokens changes nothing.

    Logged: `train/loss` of each optimizer step; `val/…` and `test/…` of `loss`, `perplexity` (its exponential) and
    `accuracy` (share of supervised tokens with the largest logit), over all tokens of the set.
    """

    sums_gradients: ClassVar[bool] = True
    """Gradients of the ranks are added; see `lora_lightning.resume`."""

    def __init__(self, *args: Any, **settings: Any) -> None:  # noqa: ANN401 - those of AdapterTask
        super().__init__(*args, **settings)
        self._totals: dict[str, _Totals] = defaultdict(_Totals)
        self._has_warned = False

    @abc.abstractmethod
    def token_sums(self, batch: Any) -> TokenSums:  # noqa: ANN401 - the data module's own type
        """Return the loss summed over the supervised tokens of a batch, their number, and how many are right."""

    def compute_loss(self, batch: Any) -> StepOutput:  # noqa: ANN401 - the data module's own type
        """Return the mean loss over the supervised tokens of one batch, 0 where there is none."""
        sums = self.token_sums(batch)
        return StepOutput(sums.loss / max(sums.num_tokens, 1))

    def unfinished_step(self) -> dict[str, Any]:
        """Return the counts of an optimizer step that awaits more batches."""
        return self._totals["train"].plain()

    def load_unfinished_step(self, state: dict[str, Any]) -> None:
        """Restore the result of `unfinished_step`."""
        self._totals["train"] = _Totals(state["loss"], state["num_right"], int(state["num_tokens"]))

    # What Lightning calls.

    def on_train_start(self) -> None:
        """Start counting, and calibrate the methods."""
        self._totals.pop("train", None)
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401 - the data module's own type
        """Return the sum of a batch's losses, in units of 1,024 tokens, times what Lightning will divide it by."""
        del batch_idx
        sums = self._checked("train", self.token_sums, batch)
        self._totals["train"].add(sums)
        return sums.loss * (self.trainer.accumulate_grad_batches / _UNIT)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the step's number of tokens, add those of penalties, then let methods act on them."""
        totals = self._totals.pop("train", _Totals())
        num_tokens = int(self._over_ranks(torch.tensor(totals.num_tokens, device=self.device)))
        if num_tokens == 0:
            self._skip(optimizer)
            return
        gradients = [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
        # Strategies average gradients over the ranks.
        torch._foreach_mul_(gradients, _UNIT * self.trainer.world_size / num_tokens)
        loss = self._over_ranks(totals.loss.to(self.device)) / num_tokens
        self.log("train/loss", loss.float(), prog_bar=True)
        self._add_penalties(optimizer)
        super().on_before_optimizer_step(optimizer)

    # Helpers.

    def _measured(self) -> dict[str, Direction | None]:
        return {"loss": "min", "perplexity": "min", "accuracy": "max"}

    def _start_evaluation(self, sets: EvaluationSets) -> None:
        super()._start_evaluation(sets)
        for prefix in sets.prefixes:
            self._totals.pop(prefix, None)

    def _evaluate(self, batch: Any, sets: EvaluationSets, index: int) -> None:  # noqa: ANN401 - the data module's own type
        sums = self._checked(sets.stage, self.token_sums, batch)
        for prefix in sets.prefixes_of(index):
            self._totals[prefix].add(sums)

    def _end_evaluation(self, sets: EvaluationSets) -> None:
        for prefix in sets.prefixes:
            values = self._values_of(prefix)
            self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, prog_bar=sets.is_all(prefix))

    def _values_of(self, prefix: str) -> dict[str, Any]:
        """Return the metrics of a set, over all ranks."""
        totals = self._totals.pop(prefix, _Totals())
        num_tokens = int(self._over_ranks(torch.tensor(totals.num_tokens, device=self.device)))
        if num_tokens == 0:
            rank_zero_warn(f"No token of the {prefix} batches is supervised, so {prefix}/loss is not a number.")
        loss = self._over_ranks(totals.loss.to(self.device)) / num_tokens
        accuracy = self._over_ranks(totals.num_right.to(self.device)) / num_tokens
        values = {"loss": loss, "perplexity": loss.exp(), "accuracy": accuracy}
        return {name: value.float() for name, value in values.items()}

    def _over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a scalar over all ranks."""
        reduced: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")
        return reduced

    def _skip(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove the gradients, so that the optimizer changes neither parameters nor its state."""
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"No token of optimizer step {self.trainer.global_step} is supervised on any rank, so it changes "
                "nothing, and neither will others like it. Check the data's labels, or how prompts are masked."
            )
        for parameter in _parameters(optimizer):
            parameter.grad = None

    def _add_penalties(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradients of the methods' penalties, which do not depend on tokens and are equal on all ranks."""
        parameters = [parameter for parameter in _parameters(optimizer) if parameter.requires_grad]
        for method, label in zip(self.methods, labels(self.methods), strict=True):
            with torch.enable_grad():
                extra = method.extra_loss(self.adapted)
            if extra is None:
                continue
            self.log(f"train/{label}_penalty", extra.detach())
            found = torch.autograd.grad(extra, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
