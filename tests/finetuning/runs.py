"""Short runs of the four modules with `AdapterFinetuning`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lora_lightning import AdapterFinetuning, ExactResume, LoRA
from lora_lightning.finetuning.state import reduced
from tests.finetuning.modules import NUM_EPOCHS, Gan, ImageClassifier, SelfSupervised, SentenceClassifier, loader, rows
from tests.resume.runs import SaveAfter

SETTINGS: dict[type[L.LightningModule], dict[str, Any]] = {
    ImageClassifier: {"module": "backbone", "method": LoRA(r=4, target_modules=["conv1", "conv2"], dropout=0.1)},
    SentenceClassifier: {"module": "bert", "method": LoRA(r=4, dropout=0.1), "modules_to_save": ["classifier"]},
    SelfSupervised: {"module": "encoder", "method": LoRA(r=4, dropout=0.1)},
    Gan: {"module": "generator", "method": LoRA(r=4, dropout=0.1)},
}
MODULES = list(SETTINGS)


class Losses(L.Callback):
    """Writes down what each training step returned, by the number of the batch."""

    def __init__(self) -> None:
        self.by_batch: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        number = trainer.fit_loop.total_batch_idx + 1
        self.by_batch[number] = {name: float(value) for name, value in outputs.items()}


def finetuning(cls: type[L.LightningModule], **changes: Any) -> AdapterFinetuning:
    known = next(one for one in MODULES if issubclass(cls, one))
    return AdapterFinetuning(**{**SETTINGS[known], **changes})


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    usual: dict[str, Any] = {"devices": 1, "max_epochs": NUM_EPOCHS, "num_sanity_val_steps": 0}
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(one, L.pytorch.callbacks.Checkpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**usual, **settings},
    )


def fit(
    cls: type[L.LightningModule],
    *callbacks: L.Callback,
    seed: int = 11,
    ckpt_path: Path | None = None,
    arguments: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[L.LightningModule, Losses]:
    """Train a module; the seed differs between a run and its continuation."""
    L.seed_everything(seed, verbose=False)
    losses, module = Losses(), cls(**arguments or {})
    run = trainer(finetuning(cls, **changes or {}), ExactResume(), losses, *callbacks, **settings)
    known = next(one for one in MODULES if issubclass(cls, one))
    run.fit(module, loader(known), ckpt_path=ckpt_path, weights_only=True)
    return module, losses


def trained_state(module: L.LightningModule) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of a module as it is now."""
    return {name: tensor.clone() for name, tensor in reduced(module, module.state_dict()).items()}


@torch.no_grad()
def answers(module: L.LightningModule) -> Tensor:
    """Return what a module predicts for its first rows."""
    cls = next(one for one in MODULES if isinstance(module, one))
    batch = [tensor[:4] for tensor in rows(cls).tensors]
    more = () if cls is ImageClassifier else (0,)
    found: Tensor = module.eval().predict_step(batch, *more)
    return found


def saved(cls: type[L.LightningModule], folder: Path, batch: int, **settings: Any) -> Path:
    """Train a module and return the checkpoint written after a batch."""
    fit(cls, SaveAfter(folder, [batch]), **settings)
    return folder / f"{batch}.ckpt"


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())
