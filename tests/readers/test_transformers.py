"""transformers' pipelines answer with merged folders, and with exported adapters, as we do."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from lora_lightning.commands.export import export
from lora_lightning.methods import DoRA
from lora_lightning.tasks import SequenceClassification
from lora_lightning.tasks.generation import generate
from tests.checkpoint.runs import rebuild_task, save_backbone, save_checkpoint
from tests.commands.language_models import save_language_model, save_lm_checkpoint

pytestmark = pytest.mark.slow
LABELS = ["good", "bad", "ugly"]
TEXTS = ["w1 w2 w3", "w4", "w5 w6"]


def piped(task: str, folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' own
        return pipeline(task, str(folder), device="cpu")


@pytest.mark.parametrize("to", ["merged", "peft"])
def test_text_generation(tmp_path: Path, to: str) -> None:
    save_language_model(tmp_path / "base")
    ckpt = save_lm_checkpoint(tmp_path / "base", tmp_path / "x.ckpt")
    export(str(ckpt), str(tmp_path / "out"), to=to)
    model = rebuild_task(ckpt).eval().adapted

    def generated(folder: Path) -> list[str]:
        pipe = piped("text-generation", folder)
        settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [pipe(text, **settings)[0]["generated_text"].strip() for text in TEXTS]

    tokenizer = piped("text-generation", tmp_path / "base").tokenizer
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = [generate(model, [one], max_new_tokens=6, stop=[tokenizer.eos_token_id])[0] for one in ids]
    expected = [tokenizer.decode(one, skip_special_tokens=True).strip() for one in tokens]
    assert generated(tmp_path / "out") == expected
    assert generated(tmp_path / "base") != expected  # negative control


def test_text_classification(tmp_path: Path) -> None:
    base = save_backbone(tmp_path / "base")
    task = SequenceClassification(backbone=str(base), method=DoRA(r=2), label_names=LABELS)
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    export(str(ckpt), str(tmp_path / "out"), to="merged")
    pipe = piped("text-classification", tmp_path / "out")
    found = [{one["label"]: one["score"] for one in pipe(text, top_k=None)} for text in TEXTS]
    model = rebuild_task(ckpt).eval().adapted
    with torch.no_grad():
        rows = [model(**pipe.tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist() for text in TEXTS]
    for scores, row in zip(found, rows, strict=True):
        assert scores == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-5)
    torch.manual_seed(0)
    control = piped("text-classification", base)(TEXTS[0], top_k=None)
    assert {one["label"] for one in control} != set(LABELS)  # negative control
