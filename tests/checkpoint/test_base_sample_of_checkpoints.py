"""A `.ckpt` loads onto its base however that is quantized, and onto no other base of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_lightning.backbones.quantization import Quantization
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA
from lora_lightning.tasks import CausalLM
from tests.checkpoint.runs import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*(MatMul8bitLt|_check_is_size|quantization|kernels).*")

BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
METHOD = LoRA(r=2, target_modules=["q_proj", "down_proj"])


class Elsewhere(CausalLM):
    """A task whose base transformers itself loads, quantized or not."""

    folder: Path
    bits: str | None = None

    def configure_backbone(self) -> nn.Module:
        config = None if self.bits is None else transformers.BitsAndBytesConfig(**BITS[self.bits])
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, quantization_config=config)


def task_class(folder: Path, bits: str | None) -> type[Elsewhere]:
    return type("Elsewhere", (Elsewhere,), {"folder": folder, "bits": bits})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        folders[name] = tmp_path_factory.mktemp(name) / "model"
        transformers.LlamaForCausalLM(config).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("used", ["nf4", "int8", None])
@pytest.mark.parametrize("trained", ["ours", "nf4", "int8"])
def test_a_checkpoint_is_loaded_in_other_bits(
    trained: str, used: str | None, bases: dict[str, Path], tmp_path: Path
) -> None:
    if trained == "ours":
        task = CausalLM(str(bases["base"]), method=METHOD, quantization=Quantization())
    else:
        task = task_class(bases["base"], trained)(method=METHOD)
    path = save_checkpoint(task, tmp_path / "x.ckpt")
    loaded = task_class(bases["base"], used).load_from_checkpoint(path, quantization=None)
    built = SavedRun.of_checkpoint(path).build(task_class(bases["base"], used), quantization=None)
    for name, tensor in task.adapter_state().items():
        torch.testing.assert_close(loaded.adapter_state()[name], tensor, check_dtype=False)
        torch.testing.assert_close(built.adapter_state()[name], tensor, check_dtype=False)
    with pytest.raises(CheckpointError, match="another base model"):  # negative control
        task_class(bases["other"], used).load_from_checkpoint(path, quantization=None)
    with pytest.raises(CheckpointError, match="another base model"):
        SavedRun.of_checkpoint(path).build(task_class(bases["other"], used), quantization=None)


def test_dense_bases_are_compared_exactly(bases: dict[str, Path], tmp_path: Path) -> None:
    path = save_checkpoint(task_class(bases["base"], None)(method=METHOD), tmp_path / "x.ckpt")

    class Nearly(Elsewhere):
        folder = bases["base"]

        def configure_backbone(self) -> nn.Module:
            model = super().configure_backbone()
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3  # far within the error of quantizing
            return model

    with pytest.raises(CheckpointError, match="have fingerprint"):
        Nearly.load_from_checkpoint(path)
    task_class(bases["base"], None).load_from_checkpoint(path)


def changed(path: Path, sample: object) -> Path:
    content = torch.load(path, weights_only=True)
    content["lora_lightning"]["base_sample"] = sample
    new = path.with_name("changed.ckpt")
    torch.save(content, new)
    return new


def test_a_checkpoint_of_an_older_version_needs_the_very_same_base(bases: dict[str, Path], tmp_path: Path) -> None:
    path = save_checkpoint(task_class(bases["base"], "nf4")(method=METHOD), tmp_path / "x.ckpt")
    content = torch.load(path, weights_only=True)
    del content["lora_lightning"]["base_sample"]
    torch.save(content, tmp_path / "old.ckpt")
    task_class(bases["base"], "nf4").load_from_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match="have fingerprint"):
        task_class(bases["base"], "int8").load_from_checkpoint(tmp_path / "old.ckpt")


@pytest.mark.parametrize(
    "sample", [[], {"values": {"a": 1}, "quantized": {}}, {"values": {}, "quantized": {"a": 3}}, {"values": {}}]
)
def test_a_damaged_sample_is_refused(bases: dict[str, Path], tmp_path: Path, sample: object) -> None:
    path = save_checkpoint(task_class(bases["base"], None)(method=METHOD), tmp_path / "x.ckpt")
    cls = task_class(bases["base"], None)
    with pytest.raises(CheckpointError, match="use another"):
        cls.load_from_checkpoint(changed(path, sample))
    with pytest.raises(CheckpointError, match="use another"):
        SavedRun.of_checkpoint(changed(path, sample))
