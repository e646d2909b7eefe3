"""`export` writes for other tools, says what they would not take, and refuses to lose an update."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lightning.__main__ import main
from lora_lightning.adapters import iter_adapters
from lora_lightning.checkpoint import read_manifest
from lora_lightning.commands.export import export
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.methods import IA3, DoRA, LoRA, PromptTuning
from lora_lightning.tasks import CausalLM, Seq2SeqLM, SequenceClassification
from tests.checkpoint.runs import PlainTask, save_backbone, save_checkpoint
from tests.commands.language_models import save_language_model
from tests.models import build, inputs, logits

LABELS = ["a", "b", "c"]


def classifier(folder: Path, method: LoRA, dtype: torch.dtype = torch.float32) -> SequenceClassification:
    return SequenceClassification(backbone=str(save_backbone(folder, dtype)), method=method, label_names=LABELS)


def lossy(tmp_path: Path) -> Path:
    """Return a checkpoint with an update that bfloat16 cannot hold."""
    task = classifier(tmp_path / "base", LoRA(r=2), torch.bfloat16)
    task.configure_model()
    for _, _, adapter in iter_adapters(task.adapted):
        for name, parameter in adapter.named_parameters():
            if name == "lora_B":
                nn.init.normal_(parameter, std=1e-4)
    return save_checkpoint(task, tmp_path / "x.ckpt", moved=False)


def test_peft_reads_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = classifier(tmp_path / "base", DoRA(r=2, target_modules=["query"]))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")
    export(str(ckpt), str(tmp_path / "adapter"))
    output = capsys.readouterr().out
    assert f"Wrote the adapter of {ckpt} to {tmp_path / 'adapter'}, for the base {tmp_path / 'base'}." in output
    assert "is known for decoder language models alone; this base is a BertForSequenceClassification." in output
    manifest = read_manifest(tmp_path / "adapter")
    assert (manifest.base, manifest.label_names) == (str(tmp_path / "base"), LABELS)

    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "adapter").eval()
    torch.testing.assert_close(fresh(**inputs(fresh)).logits, logits(task.adapted.eval()), atol=1e-5, rtol=0)
    assert (logits(build("bert")) - logits(task.adapted)).abs().max() > 1e-2  # negative control


@pytest.mark.parametrize(("name", "kind"), [("llama", CausalLM), ("t5", Seq2SeqLM)])
def test_other_tools_are_named_for_the_models_they_are_checked_for(tmp_path, capsys, name, kind) -> None:
    task = kind(backbone=str(save_language_model(tmp_path / "base", name=name)), method=DoRA(r=2))
    export(str(save_checkpoint(task, tmp_path / "x.ckpt")), str(tmp_path / "adapter"))
    output = capsys.readouterr().out
    told = ["vLLM does not take this adapter as it is. Merge it instead", "llama.cpp does not take this adapter"]
    assert all((one in output) == (name == "llama") for one in told)
    assert ("this base is a T5ForConditionalGeneration." in output) == (name == "t5")


@pytest.mark.parametrize(
    ("method", "kind", "can_merge"),
    [(PromptTuning(num_virtual_tokens=2), "PROMPT_TUNING", False), (IA3(), "IA3", True)],
)
def test_other_kinds_go_out_and_start_a_run(tmp_path, capsys, method, kind, *, can_merge) -> None:
    base = str(save_language_model(tmp_path / "base", name="llama"))
    ckpt = save_checkpoint(CausalLM(backbone=base, method=method), tmp_path / "x.ckpt")
    export(str(ckpt), str(tmp_path / "adapter"))
    output = capsys.readouterr().out
    assert f"an adapter of the kind {kind}: it takes LORA alone" in output
    assert ("--to merged" in output) is can_merge

    trained, fresh = CausalLM.load_from_checkpoint(ckpt), CausalLM(backbone=base, adapter=str(tmp_path / "adapter"))
    bare = CausalLM(backbone=base, method=method)
    for task in (trained, fresh, bare):
        task.configure_model()
    expected = logits(trained.adapted.eval())
    torch.testing.assert_close(logits(fresh.adapted.eval()), expected, atol=1e-6, rtol=0)
    assert (logits(bare.adapted.eval()) - expected).abs().max() > 1e-3  # negative control
    (tmp_path / "adapter" / "manifest.json").unlink()  # what is left is PEFT's
    (tmp_path / "adapter" / "adapter.safetensors").unlink()
    theirs = CausalLM(backbone=base, adapter=str(tmp_path / "adapter"))
    theirs.configure_model()
    torch.testing.assert_close(logits(theirs.adapted.eval()), expected, atol=1e-6, rtol=0)


def test_merged_in_a_chosen_dtype_and_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = save_checkpoint(classifier(tmp_path / "base", LoRA(r=2)), tmp_path / "x.ckpt")
    arguments = ["--ckpt_path", str(ckpt), "--output_dir", str(tmp_path / "merged"), "--to", "merged"]
    assert main(["export", *arguments, "--dtype", "bfloat16", "--max_shard_size", "20KB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Merged 4 layers of {ckpt} into {tmp_path / 'merged'}")
    assert lines[1].startswith("Cast to bfloat16, ")
    assert lines[-1].startswith("Outputs on 64 tokens move by")
    shards = list((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {one.dtype for path in shards for one in load_file(path).values()} == {torch.bfloat16}


def test_a_lost_update_is_refused_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = lossy(tmp_path)
    arguments = ["export", "--to", "merged", "--ckpt_path", str(ckpt), "--output_dir", str(tmp_path / "merged")]
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out.startswith("Cast to bfloat16, ")
    assert "would lose the update" in output.err
    assert output.err.splitlines()[-1].startswith("lora-lightning: error: Merging into bfloat16 would lose")
    assert not (tmp_path / "merged").exists()
    assert main([*arguments, "--force", "true"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_settings_of_a_merge_are_refused_for_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype is for --to merged"):
        export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"), dtype="bfloat16")


def test_what_peft_cannot_say_is_told(tmp_path: Path) -> None:
    method = DoRA(r=2, magnitude_axis="input", target_modules=["0"])
    ckpt = save_checkpoint(PlainTask(method=method), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"cannot be written in PEFT's format: .*magnitude_axis='input'"):
        export(str(ckpt), str(tmp_path / "out"), task_class="tests.checkpoint.runs.PlainTask")
    assert not (tmp_path / "out").exists()


def test_taken_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
