"""A submodule that the user's own module holds in 4 bits."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import AdapterFinetuning, ExactResume, LoRA, load_finetuned, merge_finetuned
from lora_lightning.errors import ConfigError, NotMergeable
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.finetuning.modules import seeded
from tests.finetuning.runs import same, trained_state, trainer
from tests.resume.runs import SaveAfter

pytestmark = LIGHTNING_WARNINGS


def layer() -> nn.Module:
    return bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")


class Quantized(L.LightningModule):
    """Classifies vectors by two layers in 4 bits."""

    def __init__(self, seed: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        with seeded(seed):
            self.backbone = nn.Sequential(layer(), nn.Tanh(), layer()).to("cpu")
        self.head = nn.Linear(64, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-2)


def fit(*callbacks: L.Callback, seed: int = 1, **settings: Any) -> Quantized:
    L.seed_everything(seed, verbose=False)
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 4, shuffle=True)
    module = Quantized()
    run = trainer(AdapterFinetuning(LoRA(r=4), "backbone", **settings.pop("callback", {})), ExactResume(), *callbacks)
    run.fit(module, data, **settings)
    return module


def test_a_base_in_4_bits_is_trained_saved_and_resumed(tmp_path):
    module = fit(SaveAfter(tmp_path, [4]))
    state = torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"]
    lora = {f"backbone.{index}.lora_{factor}" for index in (0, 2) for factor in "AB"}
    assert state.keys() == {*lora, "head.weight", "head.bias"}
    assert same(trained_state(load_finetuned(Quantized, tmp_path / "4.ckpt")), state)
    assert same(trained_state(fit(seed=99, ckpt_path=tmp_path / "4.ckpt")), trained_state(module))
    assert not same(trained_state(fit(seed=99)), trained_state(module))
    with pytest.raises(ValueError, match="another base model"):
        load_finetuned(Quantized, tmp_path / "4.ckpt", seed=6)


def test_it_is_not_merged(tmp_path):
    fit(SaveAfter(tmp_path, [2]))
    with pytest.raises(NotMergeable, match="quantized"):
        merge_finetuned(Quantized, tmp_path / "2.ckpt", tmp_path / "merged.ckpt")
    assert not (tmp_path / "merged.ckpt").exists()
    with pytest.raises(ConfigError, match="cannot be merged; leave merge_to out"):
        fit(callback={"merge_to": tmp_path / "merged.ckpt"})
