"""A merged folder is a plain model that computes what the adapted one did; a failed merge leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lightning.adapters import (
    adapter_state_dict,
    attach,
    disabled,
    iter_adapters,
    iter_hosts,
    load_adapter_state_dict,
)
from lora_lightning.backbones.attach import attach as attach_to_backbone
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.backbones.storage.quantized import is_quantized
from lora_lightning.checkpoint import read_manifest
from lora_lightning.checkpoint.manifest import MANIFEST_NAME
from lora_lightning.errors import CheckpointError, NotMergeable
from lora_lightning.merging import merge, write
from lora_lightning.merging.merge import merge_checkpoint
from lora_lightning.merging.report import THRESHOLD, LayerMerge, MergeLoss, UpdateLost, measure
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.tasks import AdapterTask, SequenceClassification
from tests.checkpoint.runs import PlainTask, rebuild_task, save_backbone, save_checkpoint, save_wide_base
from tests.models import build, logits

LABELS = ["bad", "neutral", "good"]


def classifier(folder: Path, method: LoRA) -> SequenceClassification:
    return SequenceClassification(backbone=str(folder), method=method, label_names=LABELS)


@pytest.mark.parametrize("method", [LoRA(r=3), DoRA(r=3, target_modules="all-linear")])
def test_merged_folder_is_plain_transformers(tmp_path: Path, method: LoRA) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = classifier(save_backbone(tmp_path / "base"), method)
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    report = merge_checkpoint(ckpt, tmp_path / "new" / "merged")

    model, info = AutoModelForSequenceClassification.from_pretrained(report.output_dir, output_loading_info=True)
    assert not any(info.values())
    adapted = task.adapted.eval()
    torch.testing.assert_close(logits(model), logits(adapted), atol=1e-5, rtol=0)
    with disabled(adapted):
        assert (logits(model) - logits(adapted)).abs().max() > 1e-2  # negative control
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {name: index for index, name in enumerate(LABELS)}
    assert AutoTokenizer.from_pretrained(report.output_dir)("w3 w5")["input_ids"] == [2, 8, 10, 3]
    assert report.has_tokenizer
    assert report.survived > 0.999
    assert len(report.layers) == sum(1 for _ in iter_adapters(adapted)) - len(task.trained_modules(adapted))
    assert report.num_bytes == sum(path.stat().st_size for path in report.output_dir.iterdir())


def test_checkpoint_holds_no_base_weight_and_reads_safely(tmp_path: Path) -> None:
    task = classifier(save_backbone(tmp_path / "base"), LoRA(r=3))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in state.values()) == task.report.num_trainable < task.report.num_total / 2
    frozen = [parameter for parameter in task.adapted.parameters() if not parameter.requires_grad]
    assert not [name for name, tensor in state.items() for other in frozen if torch.equal(tensor, other)]


def small_update(folder: Path, ckpt: Path, std: float = 1e-4, target: str = "query") -> Path:
    """Save a checkpoint whose B has a small standard deviation."""
    task = classifier(folder, LoRA(r=3, target_modules=[target]))
    task.configure_model()
    for _, _, adapter in iter_adapters(task.adapted):
        for name, parameter in adapter.named_parameters():
            if name == "lora_B":
                nn.init.normal_(parameter, std=std)
    return save_checkpoint(task, ckpt, moved=False)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_lost_update_is_refused(tmp_path: Path, stored: torch.dtype) -> None:
    ckpt = small_update(save_backbone(tmp_path / "base", stored), tmp_path / "small.ckpt")
    with pytest.raises(
        UpdateLost, match=r"Merging into bfloat16 would lose the update: .* Nothing was written"
    ) as caught:
        merge_checkpoint(ckpt, tmp_path / "merged", dtype="bfloat16")
    assert not (tmp_path / "merged").exists()
    assert caught.value.loss.survived < 0.4
    assert caught.value.loss.kept < 0.5

    report = merge_checkpoint(ckpt, tmp_path / "merged", dtype="bfloat16", force=True)
    assert report.kept == caught.value.loss.kept
    assert report.loss.dtype == "bfloat16"
    assert {tensor.dtype for tensor in load_file(report.output_dir / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_float32_keeps_a_small_update(tmp_path: Path, stored: torch.dtype) -> None:
    from transformers import AutoModelForSequenceClassification

    ckpt = small_update(save_backbone(tmp_path / "base", stored), tmp_path / "small.ckpt")
    report = merge_checkpoint(ckpt, tmp_path / "merged", dtype="float32")
    assert report.kept > 0.9999
    assert report.loss.logits is not None
    assert report.loss.logits.largest < 1e-6 < report.loss.logits.adapter_largest
    model = AutoModelForSequenceClassification.from_pretrained(report.output_dir)
    adapted = rebuild_task(ckpt).model.float()
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(adapted), atol=1e-6, rtol=0)


def test_a_usual_update_passes_in_bfloat16(tmp_path: Path) -> None:
    ckpt = small_update(save_backbone(tmp_path / "base", torch.bfloat16), tmp_path / "usual.ckpt", std=1e-2)
    report = merge_checkpoint(ckpt, tmp_path / "merged")
    assert report.kept > 0.9
    assert 0 < report.loss.logits.largest < report.loss.logits.adapter_largest


@pytest.mark.parametrize(("std", "unchanged"), [(1e-4, 0.95), (1e-2, 0.1)])
def test_share_of_unchanged_weights_in_a_layer_of_usual_size(std: float, unchanged: float) -> None:
    host = nn.Linear(384, 384, bias=False)
    nn.init.normal_(host.weight, std=0.05)
    model = nn.Sequential(host.bfloat16())
    attach(model, LoRA(r=8, alpha=16, target_modules=["0"]))
    nn.init.normal_(next(iter_adapters(model))[2].lora_B, std=std)
    _, weight, merged = next(next(iter_adapters(model))[2].merged_weights(host))
    layer = measure("0", weight, merged, torch.bfloat16)
    assert 1 - layer.survived == pytest.approx(unchanged, abs=0.06)
    assert (layer.kept < THRESHOLD) is (std < 1e-3)


def test_shares_are_weighted_by_size(tmp_path: Path) -> None:
    def layer(path: str, changed: int, survived: int, update: float, error: float) -> LayerMerge:
        return LayerMerge(
            path=path, num_changed=changed, num_survived=survived, update_squared=update, error_squared=error
        )

    empty = layer("x", 0, 0, 0.0, 0.0)
    assert (empty.survived, empty.kept) == (1.0, 1.0)
    loss = MergeLoss(layers=(empty,), dtype="float32")
    assert (loss.survived, loss.kept) == (1.0, 1.0)
    layers = (layer("a", 30, 15, 9.0, 0.0), layer("b", 10, 5, 1.0, 2.5))
    loss = MergeLoss(layers=layers, dtype="bfloat16")
    assert (loss.survived, loss.kept) == (0.5, 0.75)
    assert layers[1].kept == 0.0  # more noise than update
    assert loss.lines()[1].startswith("  b: 0.00% kept")
    many = MergeLoss(layers=(layers[1],) * 8, dtype="bfloat16")
    assert many.lines()[-1] == "  … and 3 more layers that lost less"


def test_shards(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    task = classifier(save_backbone(tmp_path / "base"), LoRA(r=3))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    report = merge_checkpoint(ckpt, tmp_path / "merged", max_shard_size="20KB")
    shards = sorted(report.output_dir.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 25_000 for path in shards)
    model = AutoModelForSequenceClassification.from_pretrained(report.output_dir)
    torch.testing.assert_close(logits(model), logits(task.adapted.eval()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_chosen_dtype(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForSequenceClassification

    task = classifier(save_backbone(tmp_path / "base"), LoRA(r=3))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    report = merge_checkpoint(ckpt, tmp_path / "merged", dtype=name)
    dtype = getattr(torch, name)
    assert {one.dtype for one in load_file(report.output_dir / "model.safetensors").values()} == {dtype}
    model = AutoModelForSequenceClassification.from_pretrained(report.output_dir)
    assert model.dtype == dtype
    move = (logits(model.float()) - logits(task.adapted.eval())).detach().abs().max()
    assert 1e-6 < move < 2e-2
    assert report.loss.logits.largest == pytest.approx(float(move), rel=5)


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        merge_checkpoint(tmp_path / "x.ckpt", tmp_path / "merged", dtype="int8")


def test_values_too_large_for_float16(tmp_path: Path) -> None:
    task = PlainTask(method=LoRA(r=2))
    task.configure_model()
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    saved = torch.load(ckpt, weights_only=True)
    for name, tensor in saved["state_dict"].items():
        if name.endswith("lora_B"):
            tensor.fill_(1e6)
    torch.save(saved, ckpt)
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        merge_checkpoint(ckpt, tmp_path / "merged", dtype="float16")


def test_outputs_on_a_text(tmp_path: Path) -> None:
    task = classifier(save_backbone(tmp_path / "base"), LoRA(r=3))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    report = merge_checkpoint(ckpt, tmp_path / "merged", sample="w3 w5 w7")
    assert report.loss.logits.num_tokens == 5
    assert report.loss.logits.largest < 1e-5


def test_plain_torch_model(tmp_path: Path) -> None:
    task = PlainTask(method=LoRA(r=2, target_modules=["0"], modules_to_save=["2"]))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    report = merge_checkpoint(ckpt, tmp_path / "merged")

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    model.load_state_dict(load_file(report.output_dir / "model.safetensors"))
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), task({"x": x}), atol=1e-5, rtol=0)
    with disabled(task.adapted):
        assert (model(x) - task({"x": x})).abs().max() > 1e-2  # negative control
    manifest = read_manifest(report.output_dir)
    assert (manifest.adapter_format, sorted(manifest.files)) == ("merged", ["model.safetensors"])
    assert not report.has_tokenizer


@pytest.mark.parametrize("kind", ["file", "full folder", "broken link"])
def test_taken_folder_is_refused_before_anything_is_loaded(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "merged"
    if kind == "file":
        target.write_text("mine")
    elif kind == "full folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.symlink_to(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="exists already"):
        merge_checkpoint(tmp_path / "no.ckpt", target)


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    ckpt = save_checkpoint(PlainTask(method=LoRA(r=2)), tmp_path / "x.ckpt")
    (tmp_path / "merged").mkdir()
    merge_checkpoint(ckpt, tmp_path / "merged")
    assert (tmp_path / "merged" / MANIFEST_NAME).is_file()


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = save_checkpoint(PlainTask(method=LoRA(r=2)), tmp_path / "x.ckpt")

    def fail(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(write, "write_manifest", fail)
    with pytest.raises(CheckpointError, match=r"could not be written: No space left"):
        merge_checkpoint(ckpt, tmp_path / "new" / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_not_mergeable_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = save_checkpoint(PlainTask(method=LoRA(r=2)), tmp_path / "x.ckpt")

    def refuse(self: object, host: nn.Module) -> None:
        raise NotMergeable("not this one")

    monkeypatch.setattr("lora_lightning.methods.low_rank.LowRankAdapter.check_mergeable", refuse)
    with pytest.raises(NotMergeable, match="not this one"):
        merge_checkpoint(ckpt, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_nothing_to_merge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = save_checkpoint(PlainTask(method=LoRA(r=2)), tmp_path / "x.ckpt")
    monkeypatch.setattr(merge, "is_attached", lambda _: False)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        merge_checkpoint(ckpt, tmp_path / "merged")


TIED = {"gpt2": ("wte", "lm_head"), "gemma3": ("model.embed_tokens", "lm_head")}


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("architecture", TIED)
def test_one_half_of_tied_weights_is_untied(tmp_path: Path, architecture: str, half: int) -> None:
    from transformers import AutoModelForCausalLM

    build(architecture).save_pretrained(tmp_path / "base")
    task = TinyCausalLM(str(tmp_path / "base"), LoRA(r=2, target_modules=[TIED[architecture][half]]))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    assert task.adapted.config.tie_word_embeddings is True
    with pytest.warns(UserWarning, match="no tokenizer"):
        report = merge_checkpoint(ckpt, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(report.output_dir)
    adapted = task.adapted.eval()
    torch.testing.assert_close(logits(model), logits(adapted), atol=1e-5, rtol=0)
    with disabled(adapted):
        assert (logits(model) - logits(adapted)).abs().max() > 1e-2  # negative control
    assert model.config.tie_word_embeddings is False
    left, right = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.equal(left, right)
    assert report.loss.logits.largest < 1e-5


NF4 = {"bits": 4, "quant_type": "nf4", "double_quant": True, "compute_dtype": "float32"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [LoRA(r=2, target_modules="all-linear"), DoRA(r=2, target_modules="all-linear")])
def test_quantized_run_merges_into_the_dequantized_base(tmp_path: Path, architecture: str, method: LoRA) -> None:
    from transformers import AutoModelForCausalLM

    base = save_wide_base(architecture, tmp_path / "base")
    task = TinyCausalLM(str(base), method, quantization=Quantization(**NF4))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="no tokenizer"):
        report = merge_checkpoint(ckpt, tmp_path / "merged", dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(report.output_dir)
    assert any(is_quantized(host) for _, host in iter_hosts(task.adapted))
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), logits(task.adapted.eval()), atol=1e-4, rtol=0)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(dense) - logits(model)).abs().max() > 1e-2  # negative control


def test_quantized_run_merges_into_the_dense_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    method = LoRA(r=2, target_modules="all-linear")
    base = save_wide_base("llama", tmp_path / "base")
    task = TinyCausalLM(str(base), method, quantization=Quantization(**NF4))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="no tokenizer"):
        report = merge_checkpoint(ckpt, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(report.output_dir)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    attach_to_backbone(expected, method)
    load_adapter_state_dict(expected, adapter_state_dict(task.adapted))
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=0)
    assert (logits(model) - logits(task.adapted.eval())).abs().max() > 1e-4  # negative control: quantizing moved it


def test_a_dense_base_cannot_be_dequantized(tmp_path: Path) -> None:
    ckpt = save_checkpoint(PlainTask(method=LoRA(r=2)), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="not quantized; leave dequantize out"):
        merge_checkpoint(ckpt, tmp_path / "merged", dequantize=True)


class TinyCausalLM(AdapterTask):
    """A language model without a head of its own to train."""

    auto_class = "AutoModelForCausalLM"

    def trained_modules(self, model: nn.Module) -> list[str]:
        return []


def test_changed_base_is_refused(tmp_path: Path) -> None:
    base = save_backbone(tmp_path / "base")
    ckpt = save_checkpoint(classifier(base, LoRA(r=3)), tmp_path / "x.ckpt")
    rebuild_task(ckpt)
    weights = load_file(base / "model.safetensors")
    from safetensors.torch import save_file

    changed = {name: tensor * 1.001 for name, tensor in weights.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on another base model"):
        merge_checkpoint(ckpt, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_missing_tokenizer_is_said(tmp_path: Path) -> None:
    task = classifier(save_backbone(tmp_path / "base", tokenizer=False), LoRA(r=3))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="gets no tokenizer"):
        report = merge_checkpoint(ckpt, tmp_path / "merged")
    assert not report.has_tokenizer
