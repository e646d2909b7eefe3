"""A real causal model learns real dialogues: Gemma 3 270M from its GGUF package, chatterbot's English pairs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning

CONFIG = Path(lora_lightning.__file__).parent / "configs" / "lora_gemma270m.yaml"
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")


def last_metric(folder: Path, name: str) -> float:
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    values = [dict(zip(header, row, strict=False)).get(name) for row in rows]
    return float([value for value in values if value][-1])


def lora_lightning(*arguments: str, folder: Path) -> str:
    """Run a command on all cores, in a process of its own: one that has used two threads can't be forked afterwards."""
    # Beside other work, threads that spin while they wait cost the most.
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "OMP_WAIT_POLICY": "passive"}
    environment = {**os.environ, **threads, "LORA_LIGHTNING_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "lora_lightning", *arguments]
    return subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_gemma_learns_and_answers(tmp_path, capsys):
    root = ("--trainer.default_root_dir", "run")
    lora_lightning("validate", "--config", str(CONFIG), *QUIET, *root, folder=tmp_path)
    lora_lightning("fit", "--config", str(CONFIG), *QUIET, *root, folder=tmp_path)
    base = last_metric(tmp_path / "run" / "version_0", "val/loss")
    tuned = last_metric(tmp_path / "run" / "version_1", "val/loss")
    with capsys.disabled():
        print(f"\nheld-out loss {base:.3f} before, {tuned:.3f} after: {tuned / base - 1:+.1%}")
    assert tuned <= 0.8 * base
    checkpoint = tmp_path / "run" / "version_1" / "checkpoints" / "last.ckpt"
    prompt = ("--prompt", "What is the capital of France?", "--max_new_tokens", "24", "--compare-base")
    shown = lora_lightning("generate", "--ckpt_path", str(checkpoint), *prompt, folder=tmp_path)
    assert "base" in shown
    assert "with the adapter" in shown
