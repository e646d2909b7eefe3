"""An adapter loads onto its base however that is quantized, and onto no other base of the same shape."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning.adapters import detach, load_adapter_state_dict
from lora_lightning.backbones.attach import attach
from lora_lightning.backbones.load import load_backbone
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.checkpoint import export_peft, load_adapter, load_peft
from lora_lightning.checkpoint.base_sample import BASE_SAMPLE_NAME, NUM_VALUES, BaseSample, why_another_base
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA
from tests.models import perturb

pytestmark = pytest.mark.filterwarnings("ignore:.*(MatMul8bitLt|_check_is_size|quantization|kernels).*")

BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
OURS = {"nf4": Quantization(), "fp4": Quantization(quant_type="fp4"), "int8": Quantization(bits=8)}
METHOD = LoRA(r=2, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a base and of another one of the same shape."""
    folders = {}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        folders[name] = tmp_path_factory.mktemp(name) / "model"  # one name for both: a warning tells other names
        transformers.LlamaForCausalLM(config).save_pretrained(folders[name])
    return folders


def theirs(folder: Path, bits: str | None) -> nn.Module:
    """Return a base as transformers itself quantizes it, or dense."""
    config = None if bits is None else transformers.BitsAndBytesConfig(**BITS[bits])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def adapted(model: nn.Module) -> nn.Module:
    attach(model, METHOD)
    return perturb(model)


@pytest.mark.parametrize("trained", OURS)
@pytest.mark.parametrize("used", [*BITS, None])
def test_a_run_in_few_bits_is_used_elsewhere(
    trained: str, used: str | None, bases: dict[str, Path], tmp_path: Path
) -> None:
    """The fault this is for: a run of this library in 4 bits, used on a base that transformers quantized."""
    model = adapted(load_backbone(str(bases["base"]), "AutoModelForCausalLM", quantization=OURS[trained]).model)
    export_peft(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*(MatMul8bitLt|_check_is_size|kernels).*")
        load_peft(theirs(bases["base"], used), tmp_path / "adapter")
    other = theirs(bases["other"], used)
    with pytest.raises(CheckpointError, match="another base model"):  # negative control
        load_peft(other, tmp_path / "adapter")


@pytest.mark.parametrize("trained", BITS)
def test_a_run_elsewhere_is_used_dense(trained: str, bases: dict[str, Path], tmp_path: Path) -> None:
    export_peft(adapted(theirs(bases["base"], trained)), tmp_path / "adapter")
    model = theirs(bases["base"], None)
    attach(model, METHOD)
    load_adapter(model, tmp_path / "adapter")
    other = theirs(bases["other"], None)
    attach(other, METHOD)
    with pytest.raises(CheckpointError, match="more than quantizing makes them differ"):  # negative control
        load_adapter(other, tmp_path / "adapter")


def test_one_layer_of_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    export_peft(adapted(theirs(bases["base"], "nf4")), tmp_path / "adapter")
    model, other = theirs(bases["base"], None), theirs(bases["other"], None)
    model.model.layers[1].mlp.down_proj.load_state_dict(other.model.layers[1].mlp.down_proj.state_dict())
    with pytest.raises(CheckpointError, match=r"values of 'model.layers.1.mlp.down_proj' differ by 1\d\d%"):
        load_peft(model, tmp_path / "adapter")


def test_dense_bases_are_compared_exactly(bases: dict[str, Path], tmp_path: Path) -> None:
    export_peft(adapted(theirs(bases["base"], None)), tmp_path / "adapter")
    model = theirs(bases["base"], None)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3  # far within the error of quantizing
    with pytest.raises(CheckpointError, match="have fingerprint"):
        load_peft(model, tmp_path / "adapter")
    load_peft(theirs(bases["base"], None), tmp_path / "adapter")


def test_a_folder_of_an_older_version_says_that_nothing_was_compared(bases: dict[str, Path], tmp_path: Path) -> None:
    export_peft(
        adapted(load_backbone(str(bases["base"]), "AutoModelForCausalLM", quantization=OURS["nf4"]).model),
        tmp_path / "adapter",
    )
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    del manifest["files"][BASE_SAMPLE_NAME]
    rewrite_manifest(tmp_path / "adapter", manifest)
    (tmp_path / "adapter" / BASE_SAMPLE_NAME).unlink()
    with pytest.warns(UserWarning, match="was not compared with this model's"):
        load_peft(theirs(bases["base"], "nf4"), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="have fingerprint"):  # a dense base is also compared
        load_peft(theirs(bases["other"], None), tmp_path / "adapter")


def rewrite_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    from lora_lightning.checkpoint.manifest import Manifest, read_manifest, write_manifest

    before = read_manifest(folder)
    kept = {name: record for name, record in before.files.items() if name in manifest["files"]}
    (folder / "manifest.json").unlink()
    write_manifest(folder, Manifest(**{**vars(before), "files": kept}))


def test_the_sample_is_small_and_says_what_is_quantized(bases: dict[str, Path], tmp_path: Path) -> None:
    export_peft(adapted(theirs(bases["base"], "nf4")), tmp_path / "adapter")
    values = load_file(tmp_path / "adapter" / BASE_SAMPLE_NAME)
    hosts = {f"model.layers.{layer}.{path}" for layer in range(2) for path in ("self_attn.q_proj", "mlp.down_proj")}
    assert values.keys() == hosts
    assert {one.shape for one in values.values()} == {(NUM_VALUES,)}
    with safe_open(tmp_path / "adapter" / BASE_SAMPLE_NAME, "pt") as file:
        assert json.loads(file.metadata()["quantized"]) == dict.fromkeys(sorted(hosts), 4)


def test_a_damaged_sample(bases: dict[str, Path], tmp_path: Path) -> None:
    export_peft(adapted(theirs(bases["base"], None)), tmp_path / "adapter")
    path = tmp_path / "adapter" / BASE_SAMPLE_NAME
    save_file(load_file(path), path, metadata={"quantized": "[3]"})
    with pytest.raises(CheckpointError, match=r"cut short or changed|SHA-256"):
        load_peft(theirs(bases["base"], None), tmp_path / "adapter")


def test_errors_add_up_over_all_weights() -> None:
    """Each weight within its own limit, all together beyond theirs: no quantizing does that."""
    generator = torch.Generator().manual_seed(0)
    mine, far = BaseSample(), BaseSample()
    for number in range(20):
        values = torch.randn(64, generator=generator)
        mine.add(str(number), values, 4)
        far.add(str(number), values + 0.65 * torch.randn(64, generator=generator), None)
    assert "values of its weights differ" in str(why_another_base(mine, far))
    assert why_another_base(mine, mine) is None
    near = BaseSample({path: values * 1.1 for path, values in mine.values.items()}, dict.fromkeys(mine.values, 4))
    assert why_another_base(mine, near) is None
    assert why_another_base(mine, BaseSample()) == "its adapters stand on other weights"


def test_the_values_go_with_the_adapters(bases: dict[str, Path]) -> None:
    """A model that was detached is compared anew."""
    from lora_lightning.checkpoint.base_sample import base_sample_of
    from lora_lightning.checkpoint.fingerprint import fingerprint

    model = theirs(bases["base"], None)
    attach(model, METHOD)
    first = fingerprint(model)
    assert base_sample_of(model) is not None
    detach(model)
    assert base_sample_of(model) is None
    attach(model, LoRA(r=2, target_modules=["k_proj"]))
    assert base_sample_of(model) is None
    assert fingerprint(model) != first
    with pytest.raises(CheckpointError):
        load_adapter_state_dict(model, {})
