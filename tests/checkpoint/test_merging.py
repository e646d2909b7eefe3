"""A merged folder is a plain model that computes what the adapted one did; a failed merge leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lightning.adapters import disabled, iter_adapters
from lora_lightning.checkpoint import merging, read_manifest
from lora_lightning.checkpoint.manifest import MANIFEST_NAME
from lora_lightning.checkpoint.merging import LayerMerge, MergeReport, merge_checkpoint
from lora_lightning.checkpoint.rebuild import rebuild_task
from lora_lightning.errors import CheckpointError, NotMergeable
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.tasks import AdapterTask, SequenceClassification
from tests.checkpoint.runs import PlainTask, save_backbone, save_checkpoint
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


def test_a_bfloat16_base_loses_small_updates_and_says_so(tmp_path: Path) -> None:
    task = classifier(save_backbone(tmp_path / "base", torch.bfloat16), LoRA(r=3))
    task.configure_model()
    for _, _, adapter in iter_adapters(task.adapted):
        for name, parameter in adapter.named_parameters():
            if name == "lora_B":
                nn.init.normal_(parameter, std=1e-4)
    ckpt = save_checkpoint(task, tmp_path / "small.ckpt", moved=False)
    report = merge_checkpoint(ckpt, tmp_path / "merged")
    assert 0 < report.survived < 0.3
    assert {tensor.dtype for tensor in load_file(report.output_dir / "model.safetensors").values()} == {torch.bfloat16}


def test_shares_are_weighted_by_elements(tmp_path: Path) -> None:
    layer = LayerMerge(path="x", num_changed=0, num_survived=0)
    assert layer.survived == 1.0
    report = MergeReport(output_dir=tmp_path, layers=(layer,), num_bytes=0, has_tokenizer=False)
    assert report.survived == 1.0
    layers = (
        LayerMerge(path="a", num_changed=30, num_survived=15),
        LayerMerge(path="b", num_changed=10, num_survived=5),
    )
    assert MergeReport(output_dir=tmp_path, layers=layers, num_bytes=0, has_tokenizer=False).survived == 0.5


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

    monkeypatch.setattr(merging, "write_manifest", fail)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left"):
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
    monkeypatch.setattr(merging, "is_attached", lambda _: False)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        merge_checkpoint(ckpt, tmp_path / "merged")


def test_tied_embeddings_are_untied(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    build("gpt2").save_pretrained(tmp_path / "base")
    task = TinyCausalLM(str(tmp_path / "base"), LoRA(r=2, target_modules=["wte"]))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="no tokenizer"):
        report = merge_checkpoint(ckpt, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(report.output_dir)
    adapted = task.adapted.eval()
    torch.testing.assert_close(logits(model), logits(adapted), atol=1e-5, rtol=0)
    with disabled(adapted):
        assert (logits(model) - logits(adapted)).abs().max() > 1e-2  # negative control
    assert model.config.tie_word_embeddings is False


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
