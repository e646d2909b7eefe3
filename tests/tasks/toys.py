"""A custom task on a plain torch model, and a method that records every hook it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import AdapterTask, StepOutput
from lora_lightning.adapters import Adapter, Method, ModelView, OutputAdapter, Role, iter_adapters


class Tagger(AdapterTask):
    """Sums token ids modulo three with torch's own transformer layers."""

    def configure_backbone(self) -> nn.Module:
        generator = torch.random.get_rng_state()
        torch.manual_seed(7)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(80, 3))
        torch.random.set_rng_state(generator)
        return model

    def compute_loss(self, batch: Any) -> StepOutput:
        logits = self.adapted(batch[0])
        return StepOutput(F.cross_entropy(logits, batch[1]), logits, batch[1])

    def configure_metrics(self):
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        return MetricCollection({"accuracy": MulticlassAccuracy(3, average="micro")})

    def predict(self, batch: Any) -> Tensor:
        return self.adapted(batch[0]).argmax(-1)


def loader(num: int = 64, batch_size: int = 16) -> DataLoader:
    x = torch.randint(0, 20, (num, 5), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, x.sum(1) % 3), batch_size=batch_size)


def trainer(**settings: Any) -> L.Trainer:
    usual = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**usual, **settings})


class Delta(OutputAdapter):
    """Adds a trainable vector to the host's output."""

    roles: ClassVar = {"delta": Role.BIAS}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(width))
        self.is_folded = False

    def fold(self) -> None:
        self.is_folded = True

    def forward(self, host: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return output + self.delta

    def check_mergeable(self, host: nn.Module) -> None:
        """Any host with a bias takes the vector."""

    def merge_into(self, host: nn.Module) -> None:
        host.bias.add_(self.delta)


@dataclass(frozen=True, kw_only=True)
class Recorder(Method):
    """Hangs a `Delta` on one module and writes down each hook call in `journal`."""

    name: ClassVar[str] = "recorder"
    journal: ClassVar[list[Any]] = []

    host: str = "3"
    width: int = 3
    penalty: float = 0.5

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        yield self.host, Delta(self.width)

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        losses = [loss(batch) for batch in batches]
        losses[0].backward()
        self.journal.append(("calibrate", len(losses)))

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        delta = self.delta(model).delta
        return self.penalty * (delta - 1).square().sum()

    def before_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        self.journal.append(("before", step, total_steps, self.delta(model).delta.grad is not None))

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        self.journal.append(("after", step, total_steps, self.delta(model).delta.detach().clone()))

    def extra_state(self, model: nn.Module) -> dict[str, Any]:
        return {"calls": len(self.journal), "note": "kept"}

    def load_extra_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.journal.append(("loaded", state))

    @staticmethod
    def delta(model: nn.Module) -> Delta:
        return next(adapter for _, _, adapter in iter_adapters(model) if isinstance(adapter, Delta))
