"""sentence-transformers embeds texts with merged and exported encoders as our adapted encoder does."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.commands.export import export
from lora_lightning.methods import LoRA
from lora_lightning.tasks import AdapterTask, StepOutput
from tests.checkpoint.runs import rebuild_task, save_backbone, save_checkpoint

library = pytest.importorskip("sentence_transformers", reason="not installed; pip install 'lora-lightning[readers]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]


class Encoder(AdapterTask):
    """An encoder without a head."""

    def configure_backbone(self) -> nn.Module:
        from transformers import AutoModel

        assert self.backbone is not None
        return AutoModel.from_pretrained(self.backbone)

    def compute_loss(self, batch: dict[str, Tensor]) -> StepOutput:
        raise NotImplementedError


@torch.no_grad()
def mean_of_tokens(model: nn.Module, tokenizer: object) -> Tensor:
    """Return the mean of each text's last hidden states, `[texts, hidden size]`."""
    rows = [tokenizer(text, return_tensors="pt") for text in TEXTS]  # type: ignore[operator]  # a union of tokenizers, of which some cannot be called
    return torch.stack([model(**row).last_hidden_state[0].mean(0) for row in rows])


def embedded(folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the folder names no pooling, so that the mean is taken
        model = library.SentenceTransformer(str(folder), device="cpu")
        return torch.from_numpy(model.encode(TEXTS)).float()


def test_a_merged_encoder_embeds_as_the_adapted_one(tmp_path: Path) -> None:
    base = save_backbone(tmp_path / "base")
    ckpt = save_checkpoint(
        Encoder(backbone=str(base), method=LoRA(r=4, target_modules="all-linear")), tmp_path / "x.ckpt"
    )
    export(str(ckpt), str(tmp_path / "out"), "merged", f"{Encoder.__module__}.Encoder")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "out")  # the run had no data, and so no tokenizer
    expected = mean_of_tokens(rebuild_task(ckpt, Encoder).eval().adapted, tokenizer)
    torch.testing.assert_close(embedded(tmp_path / "out"), expected, atol=1e-5, rtol=0)
    assert (embedded(base) - expected).abs().max() > 1e-2  # negative control
