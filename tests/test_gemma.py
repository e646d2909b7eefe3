"""A real causal model learns real dialogues: Gemma 3 270M from its GGUF package, chatterbot's English pairs."""

from pathlib import Path

import pytest
import torch

from lora_lightning.__main__ import main

CONFIG = Path(__file__).parent.parent / "configs" / "lora_gemma270m.yaml"
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")


def last_metric(folder: Path, name: str) -> float:
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    values = [dict(zip(header, row, strict=False)).get(name) for row in rows]
    return float([value for value in values if value][-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows of pkg.*", "ignore:.*max_length")  # what the data say of themselves
def test_gemma_learns_and_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(2)
    root = ("--trainer.default_root_dir", "run")
    assert main(["validate", "--config", str(CONFIG), *QUIET, *root]) == 0
    assert main(["fit", "--config", str(CONFIG), *QUIET, *root]) == 0
    base = last_metric(tmp_path / "run" / "version_0", "val/loss")
    tuned = last_metric(tmp_path / "run" / "version_1", "val/loss")
    with capsys.disabled():
        print(f"\nheld-out loss {base:.3f} before, {tuned:.3f} after: {tuned / base - 1:+.1%}")
    assert tuned <= 0.8 * base
    checkpoint = tmp_path / "run" / "version_1" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    prompt = ["--prompt", "What is the capital of France?", "--max_new_tokens", "24", "--compare-base"]
    assert main(["generate", "--ckpt_path", str(checkpoint), *prompt]) == 0
    shown = capsys.readouterr().out
    assert "base" in shown
    assert "with the adapter" in shown
