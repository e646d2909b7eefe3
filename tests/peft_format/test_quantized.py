"""PEFT's files on a base that transformers stored in 4 bits itself: both libraries answer alike, in and out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from torch import nn

from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint import export_peft, load_peft
from lora_lightning.errors import CheckpointError
from tests import quantizable
from tests.peft_format.kinds import KINDS, answers, move

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and bitsandbytes' own hints

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the folders of a base and of another one of the same shape."""
    folders = [tmp_path_factory.mktemp(name) / "model" for name in ("base", "other")]
    for seed, folder in enumerate(folders):
        quantizable.build("llama", seed).save_pretrained(folder)
    return folders


def in_bits(folder: Path, quant_type: str = "nf4") -> Any:
    settings = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_compute_dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="float32")
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # that kernel computes in bfloat16
    return model.eval()


def theirs(kind: str, base: nn.Module, folder: Path) -> nn.Module:
    settings = {**KINDS[kind].settings, **({"target_modules": TARGETS} if KINDS[kind].targets else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, KINDS[kind].theirs(task_type="CAUSAL_LM", **settings)).eval()
    move(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(kind: str, folders: list[Path], tmp_path: Path) -> None:
    base = answers(in_bits(folders[0]))
    expected = answers(theirs(kind, in_bits(folders[0]), tmp_path / "theirs"))
    model = in_bits(folders[0])
    load_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=0)
    assert (expected - base).abs().max() > 1e-3  # negative control

    own = in_bits(folders[0])
    attach(own, KINDS[kind].ours(TARGETS if KINDS[kind].targets else None))
    move(own)
    export_peft(own, tmp_path / "ours", own_kind=True)
    again = peft.PeftModel.from_pretrained(in_bits(folders[0]), tmp_path / "ours").eval()
    torch.testing.assert_close(answers(again), answers(own), atol=1e-5, rtol=0)
    assert (answers(own) - base).abs().max() > 1e-3  # negative control


@pytest.mark.parametrize("kind", ["lora", "vera", "ia3"])
def test_another_base(kind: str, folders: list[Path], tmp_path: Path) -> None:
    own = in_bits(folders[0])
    attach(own, KINDS[kind].ours(TARGETS))
    move(own)
    export_peft(own, tmp_path / "ours")
    load_peft(in_bits(folders[0], "fp4"), tmp_path / "ours")  # the same base in another way of quantizing
    for quant_type in ("nf4", "fp4"):
        with pytest.raises(CheckpointError, match="more than quantizing makes them differ"):
            load_peft(in_bits(folders[1], quant_type), tmp_path / "ours")
