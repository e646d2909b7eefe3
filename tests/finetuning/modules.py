"""Four LightningModules as people write them, none of which knows this library; their base weights are seeded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

NUM_ROWS, BATCH_SIZE, NUM_EPOCHS = 26, 4, 2
NUM_BATCHES = 7


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw base weights from a seed, as pretrained ones come from a file."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Block(nn.Module):
    """A residual block, as in torchvision's ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class ImageClassifier(L.LightningModule):
    """A residual network whose final layer was replaced, with a schedule and a counter of its own."""

    def __init__(self, width: int = 16, lr: float = 1e-2, seed: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        with seeded(seed):
            stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.backbone = nn.Sequential(stem, Block(width), Block(width), pool)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(width, 3)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.backbone(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.num_seen += len(x)
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class SentenceClassifier(L.LightningModule):
    """A transformers model with its own head, created in `configure_model`; the loss comes with the output."""

    def __init__(self, hidden_size: int = 32, seed: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bert: nn.Module | None = None

    def configure_model(self) -> None:
        if self.bert is not None:
            return
        size = self.hparams.hidden_size
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=size,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * size,
            max_position_embeddings=32,
            num_labels=3,
        )
        with seeded(self.hparams.seed):
            self.bert = transformers.BertForSequenceClassification(config)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        ids, labels = batch
        return {"loss": self.bert(input_ids=ids, labels=labels).loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids, labels = batch
        self.log("val_loss", self.bert(input_ids=ids, labels=labels).loss)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.bert(input_ids=batch[0]).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)


class SelfSupervised(L.LightningModule):
    """Optimizes manually, accumulates three batches, and follows its encoder with a frozen teacher, as BYOL does."""

    def __init__(self, width: int = 32, seed: int = 5, every: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        with seeded(seed):
            self.encoder = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, width))
            self.projector = nn.Linear(width, 8)
            self.teacher = nn.Linear(width, 8).requires_grad_(requires_grad=False)
            self.frozen_features = nn.Linear(8, width).requires_grad_(requires_grad=False)
        self.teacher.load_state_dict(self.projector.state_dict())

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn_like(x)

    def loss(self, x: Tensor) -> Tensor:
        noisy = x + 0.1 * self.noise(x)
        target = self.teacher(torch.tanh(self.frozen_features(x)))
        return F.mse_loss(self.projector(self.encoder(noisy)), target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = self.loss(batch[0])
        self.manual_backward(loss / self.hparams.every)
        if (self.trainer.fit_loop.total_batch_idx + 1) % self.hparams.every == 0:
            optimizer.step()
            optimizer.zero_grad()
            for ours, theirs in zip(self.teacher.parameters(), self.projector.parameters(), strict=True):
                ours.data = 0.9 * ours.data + 0.1 * theirs.data
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.projector(self.encoder(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([*self.encoder.parameters(), *self.projector.parameters()], lr=1e-2)


class Gan(L.LightningModule):
    """Two optimizers, as in Lightning's own example; the generator steps in every second batch."""

    def __init__(self, width: int = 32, seed: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        with seeded(seed):
            self.generator = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
            self.generator.append(nn.Linear(width, 8))
            self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), 4, device=self.device)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        real = batch[0]
        first, second = self.optimizers()
        noise = self.noise(real)
        losses = {}
        if batch_idx % 2 == 0:
            self.toggle_optimizer(first)
            score = self.discriminator(self.generator(noise))
            losses["generator"] = F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
            self.manual_backward(losses["generator"])
            first.step()
            first.zero_grad()
            self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        good, bad = self.discriminator(real), self.discriminator(self.generator(noise).detach())
        losses["loss"] = F.softplus(-good).mean() + F.softplus(bad).mean()
        self.manual_backward(losses["loss"])
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)
        return {name: loss.detach() for name, loss in losses.items()}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.generator(batch[0][:, :4])

    def configure_optimizers(self) -> Any:
        generating = torch.optim.Adam(self.generator.parameters(), lr=1e-2, betas=(0.5, 0.999))
        return generating, torch.optim.Adam(self.discriminator.parameters(), lr=1e-2, betas=(0.5, 0.999))


def rows(module: type[L.LightningModule], num: int = NUM_ROWS) -> TensorDataset:
    """Return random rows of the kind that a module reads."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (num,), generator=generator)
    if module is ImageClassifier:
        return TensorDataset(torch.randn(num, 3, 8, 8, generator=generator), labels)
    if module is SentenceClassifier:
        return TensorDataset(torch.randint(1, 64, (num, 7), generator=generator), labels)
    return TensorDataset(torch.randn(num, 8, generator=generator))


def loader(
    module: type[L.LightningModule], num: int = NUM_ROWS, batch_size: int = BATCH_SIZE, *, shuffle: bool = True
) -> DataLoader[Any]:
    """Return a loader of such rows, as people write them."""
    return DataLoader(rows(module, num), batch_size, shuffle=shuffle)
