"""A command line's config, and what is asked of its output."""

from pathlib import Path

import pandas as pd

from lora_lightning.__main__ import main

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
CONFIG = """\
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: ToyTask
  init_args:
    method:
      class_path: LoRA
      init_args: {r: 2, alpha: 4, target_modules: ["2"]}
    optim: {lr: 1e-2}
data:
  class_path: ToyData
  init_args: {num_points: 8}
"""


def mistake(capsys, *arguments):
    """Run a command line that must fail, and return the one line that it prints; nothing may be written."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    status = main(list(arguments))
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("lora-lightning: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert sorted(Path().rglob("*")) == before
    return error


def write(text, name="bad.yaml"):
    Path(name).write_text(text)
    return name


def metrics_of(folder):
    """Return what a run logged, but for how long it took."""
    metrics = pd.read_csv(Path(folder) / "metrics.csv")
    counted = metrics.drop(columns=[name for name in metrics if name.endswith("per_second")])
    return counted.fillna(-1.0).to_dict("list")  # an empty cell equals another
