"""`merge` writes the folder and says what became of the update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_lightning.__main__ import main
from lora_lightning.commands.merge import merge
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA
from lora_lightning.tasks import SequenceClassification
from tests.adapters.toys import Scale
from tests.checkpoint.runs import PlainTask, save_backbone, save_checkpoint


def test_says_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_backbone(tmp_path / "base", torch.bfloat16)
    task = SequenceClassification(backbone=str(base), method=LoRA(r=2), label_names=["a", "b", "c"])
    merge(str(save_checkpoint(task, tmp_path / "x.ckpt")), str(tmp_path / "merged"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Merged 4 layers of {tmp_path / 'x.ckpt'} into {tmp_path / 'merged'} (")
    assert lines[1].startswith("Cast to bfloat16, ")
    assert lines[-1].startswith("Outputs on 64 tokens move by ")
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_says_when_there_is_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = save_checkpoint(PlainTask(method=LoRA(r=2)), tmp_path / "x.ckpt")
    merge(str(ckpt), str(tmp_path / "merged"), task_class="tests.checkpoint.runs.PlainTask")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "Cast to float32, 100.00% of the update is kept by its squared norm; 100.00% of the weights that it changes "
        "stay changed.",
        "The folder holds no tokenizer.",
    ]


def test_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        merge(str(tmp_path / "no.ckpt"), str(tmp_path / "merged"))


@pytest.mark.parametrize("command", [["merge"], ["export", "--to", "merged"]])
def test_a_method_that_cannot_merge_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    ckpt = save_checkpoint(PlainTask(method=Scale(target_modules=["0"])), tmp_path / "x.ckpt")
    arguments = ["--ckpt_path", str(ckpt), "--output_dir", str(tmp_path / "merged")]
    assert main([*command, *arguments, "--task_class", "tests.checkpoint.runs.PlainTask"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"lora-lightning: error: {ckpt} was not merged: InputScale changes more than a weight and cannot be merged; "
        "keep it attached, and load its adapter folder onto the base wherever it is used."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt"]
