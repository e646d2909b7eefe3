"""LoftQ's start against the optimal correction, computed in float64."""

import pytest
import torch

from lora_lightning import DeltaLoRA, DoRA, LoRA
from lora_lightning.adapters import disabled, is_attached, iter_adapters
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones.attach import attach
from lora_lightning.backbones.load import load_backbone
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.errors import BackboneError, ConfigError
from tests import models, quantizable

RANK = 6
LOFTQ = LoRA(r=RANK, alpha=3, init="loftq", target_modules="all-linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("llama")
    quantizable.build("llama").save_pretrained(path)
    return str(path)


def load(folder: str, quantization: Quantization | None) -> torch.nn.Module:
    return load_backbone(folder, "AutoModelForCausalLM", quantization=quantization).model


@pytest.mark.parametrize("quantization", [Quantization(compute_dtype="float32"), Quantization(bits=8)])
def test_the_error_falls_by_the_optimal_amount(folder, quantization):
    dense, model = load(folder, None), load(folder, quantization)
    attach(model, LOFTQ)
    hosts = list(iter_adapters(model))
    assert len(hosts) == 14
    for path, host, adapter in hosts:
        weight, quantized = read_weight(dense.get_submodule(path)).double(), read_weight(host).double()
        left = weight - (quantized + adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double())
        singular = torch.linalg.svdvals(weight - quantized)
        assert left.norm().item() == pytest.approx(singular[RANK:].norm().item(), rel=1e-4)
        assert left.norm() < 0.95 * (weight - quantized).norm()
        one_less = singular[RANK - 1 :].norm().item()  # the control: what a rank of one less could reach
        assert left.norm().item() != pytest.approx(one_less, rel=1e-4)


def test_the_outputs_move_towards_the_dense_model_and_disabled_gives_the_quantized_one(folder):
    dense, model = load(folder, None), load(folder, Quantization(compute_dtype="float32"))
    with torch.no_grad():
        expected, quantized = models.logits(dense), models.logits(model)
        attach(model, LoRA(r=24, init="loftq", target_modules="all-linear"))
        assert models.gap(models.logits(model), expected) < 0.9 * models.gap(quantized, expected)
        with disabled(model):
            assert torch.equal(models.logits(model), quantized)


def test_without_files_it_is_an_error_that_leaves_the_model_bare(folder):
    model = load(folder, Quantization(compute_dtype="float32"))
    model.config._name_or_path = ""
    with pytest.raises(BackboneError, match="does not say which files"):
        attach(model, LOFTQ)
    assert not is_attached(model)
    model.config._name_or_path = f"{folder}/gone"
    with pytest.raises(BackboneError, match="from before quantizing, which failed"):
        attach(model, LOFTQ)
    assert not is_attached(model)


@pytest.mark.parametrize("kind", [DoRA, DeltaLoRA])
def test_it_is_loras_alone(kind):
    with pytest.raises(ConfigError, match="init='loftq'"):
        kind(init="loftq")
