"""A tiny backbone on disk, and checkpoints of tasks on it, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lora_lightning.checkpoint.reading import read_checkpoint
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.tasks import AdapterTask, StepOutput
from tests import models

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(models.VOCABULARY - 5))]


class PlainTask(AdapterTask):
    """A task on a plain torch model with a classifier."""

    def configure_backbone(self) -> nn.Module:
        generator = torch.Generator().manual_seed(5)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.adapted(batch["x"])

    def compute_loss(self, batch: dict[str, Tensor]) -> StepOutput:
        return StepOutput(nn.functional.cross_entropy(self(batch), batch["labels"]))


def save_backbone(folder: Path, dtype: torch.dtype = torch.float32, *, tokenizer: bool = True) -> Path:
    """Write a tiny BERT without a classification head, as pretrained encoders come, and its tokenizer."""
    from transformers import BertTokenizerFast

    models.build("bert").bert.to(dtype).save_pretrained(folder)
    if tokenizer:
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(WORDS))
        BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    return folder


def save_wide_base(architecture: str, folder: Path) -> Path:
    """Write a tiny decoder that is wide enough for 4-bit layers: their inputs are multiples of 64."""
    import transformers

    wide = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "gpt2": {"n_embd": 64}}[architecture]
    name = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[architecture]
    config = models.build(architecture).config
    config.update(wide)
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def save_checkpoint(task: AdapterTask, path: Path, *, moved: bool = True) -> Path:
    """Build a task's model, move its adapters off their start unless told not to, and save it as a Trainer would."""
    task.configure_model()
    if moved:
        models.perturb(task.adapted)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return path


def rebuild_task(path: Path, task_class: type[L.LightningModule] | None = None) -> Any:
    """Read a checkpoint and build its task."""
    return SavedRun.of_checkpoint(path).build(task_class)


def read_content(path: Path) -> dict[str, Any]:
    """Return what a `.ckpt` file holds, having compared it with its manifest."""
    return read_checkpoint(path).content
