"""The commands `combine` and `shrink`, on adapters as `fit` writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_lightning import detach, load_peft
from lora_lightning.__main__ import main
from lora_lightning.checkpoint import read_manifest
from lora_lightning.methods import AdaLoRA, LoRA
from lora_lightning.tasks import SequenceClassification
from tests.checkpoint.runs import rebuild_task, save_backbone, save_checkpoint
from tests.models import logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `.ckpt` of a classifier that was trained for two epochs."""
    folder = tmp_path_factory.mktemp("run")
    save_backbone(folder / "base")
    rows = [f"w{index} w{index + 1},{'ab'[index % 2]}" for index in range(24)]
    (folder / "data.csv").write_text("\n".join(["text,label", *rows]))
    words = [
        "fit",
        "--model=SequenceClassification",
        f"--model.backbone={folder / 'base'}",
        "--model.method=LoRA",
        "--model.method.r=8",
        "--model.optim.lr=0.02",
        "--data=TextClassificationData",
        f"--data.train={folder / 'data.csv'}",
        "--data.val_size=8",
        "--data.test_size=2",
        "--data.batch_size=4",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder / 'runs'}",
    ]
    assert main(words) == 0
    return folder / "runs/version_0/checkpoints/last.ckpt"


def test_the_folder_of_a_run_is_cut_measured_and_used_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.with_suffix("")
    words = [f"--adapter_dir={folder}", f"--ckpt_path={run}", f"--output_dir={tmp_path / 'narrow'}"]
    assert main(["shrink", *words, "--max_error=0.2", "--weigh-inputs"]) == 0
    output = capsys.readouterr().out
    assert "relative error against the outputs of the updates on the data: 0." in output
    assert "val/accuracy: " in output
    derived = read_manifest(tmp_path / "narrow").derived
    assert derived is not None
    assert derived["weighted_by_inputs"] is True
    assert 0 < derived["error"] <= 0.2
    base = str(run.parents[3] / "base")
    start = SequenceClassification(backbone=base, adapter=str(tmp_path / "narrow"), label_names=["a", "b"])
    start.configure_model()  # another run starts from it
    assert read_manifest(tmp_path / "narrow").label_names == ["a", "b"]
    assert (tmp_path / "narrow/tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()


def test_half_of_a_run_twice_is_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder and the checkpoint beside it hold one adapter."""
    words = ["--adapter", f"a={run}:0.5", "--adapter", f"b={run.with_suffix('')}:0.5", f"--ckpt_path={run}"]
    assert main(["combine", *words, f"--output_dir={tmp_path / 'out'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in lines:
        name, arrow, after = line.strip().rpartition(" → ")
        if arrow:
            before = float(name.rpartition(": ")[2])
            assert abs(before - float(after)) <= 1e-3 * abs(before)
    assert sum("→" in line for line in lines) >= 2
    trained = rebuild_task(run)
    expected, other = trained.adapted.eval(), rebuild_task(run).adapted.eval()
    detach(other)
    base = logits(other)
    load_peft(other, tmp_path / "out")
    torch.testing.assert_close(logits(other), logits(expected), atol=1e-5, rtol=0)
    assert (base - logits(expected)).abs().max() > 1e-3  # control


def test_a_relative_is_read_through_its_checkpoint(tmp_path: Path) -> None:
    """AdaLoRA's own folder is completed by the `.ckpt` beside it."""
    method = AdaLoRA(target_r=2, init_r=3, target_modules=["query"])
    task = SequenceClassification(
        backbone=str(save_backbone(tmp_path / "base")), method=method, label_names=["a", "b", "c"]
    )
    path = save_checkpoint(task, tmp_path / "x.ckpt")
    assert main(["shrink", f"--adapter_dir={path}", "--rank=3", f"--output_dir={tmp_path / 'out'}"]) == 0
    model = rebuild_task(path).adapted.eval()
    expected = logits(model)
    detach(model)
    base = logits(model)
    load_peft(model, tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    assert (base - expected).abs().max() > 1e-3  # control


REFUSED = {
    "no-weight": (["combine", "--adapter", "de", "--output_dir=out"], "must be name=FOLDER:WEIGHT"),
    "no-adapter": (["combine", "--output_dir=out"], "adapter"),
    "ranks": (["shrink", "--adapter_dir=x", "--nested=4,x", "--output_dir=out"], "whole numbers with commas"),
    "inputs": (["shrink", "--adapter_dir=x", "--rank=1", "--weigh-inputs", "--output_dir=out"], "needs data"),
    "missing": (["shrink", "--adapter_dir=x", "--rank=1", "--output_dir=out"], "x is not an adapter"),
    "method": (["combine", "--adapter=a=x", "--method=tie", "--output_dir=out"], "ties"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[case]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_both_stand_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "  combine " in output
    assert "  shrink " in output
    assert LoRA.__name__ not in output  # control
