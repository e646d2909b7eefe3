"""PEFT's wrapper is named in a folder where the model takes what that wrapper hands on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_lightning import LoRA, attach, export_peft
from lora_lightning.peft_format.config import CONFIG_NAME
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
SOUNDS = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SPEECH = {
    **{"d_model": 32, "vocab_size": 64, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0},
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
}
FEATURES = {"input_features": torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(1))}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "sounds": (
        lambda: transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**SMALL, **SOUNDS)),
        {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(1))},
        "SEQ_CLS",
    ),
    "speech to text": (
        lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SPEECH)),
        {**FEATURES, "decoder_input_ids": torch.tensor([[5, 6], [7, 8]])},
        "SEQ_2_SEQ_LM",
    ),
}


def adapted(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    attach(model, LoRA(r=2, target_modules=["q_proj"]))
    return models.perturb(model, std=0.5)


def bare(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("name", CASES)
def test_models_of_sounds_take_the_general_wrapper(tmp_path: Path, name: str) -> None:
    build, rows, wrapper = CASES[name]
    model = adapted(build)
    export_peft(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8"))
    assert config["task_type"] is None
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(bare(build), tmp_path).eval()
        expected = model(**rows).logits
        assert models.gap(theirs(**rows).logits, expected) <= 1e-5
        assert models.gap(bare(build)(**rows).logits, expected) > 1e-4
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, "task_type": wrapper}), encoding="utf-8")
    with pytest.raises((TypeError, KeyError), match=r"input_ids|classifier"):  # control
        peft.PeftModel.from_pretrained(bare(build), tmp_path)(**rows)


@pytest.mark.parametrize(("name", "wrapper"), [("t5", "SEQ_2_SEQ_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_models_of_text_take_their_own_wrapper(tmp_path: Path, name: str, wrapper: str) -> None:
    model = models.build(name)
    attach(model, LoRA(r=2))
    export_peft(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8"))["task_type"] == wrapper


def test_models_of_images_and_text_generate_behind_their_input(tmp_path: Path) -> None:
    text = {**SMALL, "vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
    vision = {**SMALL, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(vision_config=vision, text_config={**text, "model_type": "llama"})
    model = transformers.LlavaForConditionalGeneration(config)
    attach(model, LoRA(r=2, target_modules=["q_proj"]))
    export_peft(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8"))["task_type"] == "CAUSAL_LM"
