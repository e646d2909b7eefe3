"""lm-eval scores merged folders and exported adapters as our model scores the same rows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning.commands.export import export
from tests.checkpoint.runs import rebuild_task
from tests.commands.language_models import save_language_model, save_lm_checkpoint

lm_eval: Any = pytest.importorskip("lm_eval", reason="not installed; pip install 'lm-eval>=0.4.12'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # lm-eval's, evaluate's and PEFT's own

ROWS = [{"question": f"w{n} w{n + 1}", "choices": [f"w{n + 2}", f"w{n + 7}"], "answer": n % 2} for n in range(12)]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    save_language_model(folder / "base")
    ckpt = save_lm_checkpoint(folder / "base", folder / "x.ckpt")
    for to in ("merged", "peft"):
        export(str(ckpt), str(folder / to), to=to)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks").mkdir()
    (folder / "tasks/tiny.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return folder


def evaluated(folder: Path, model: Path, adapter: Path | None = None) -> list[float]:
    """Return what lm-eval takes for the log likelihood of each choice of each row."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = HFLM(str(model), peft=None if adapter is None else str(adapter), device="cpu", batch_size=4)
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        result = lm_eval.simple_evaluate(
            wrapped, tasks=["tiny"], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
    samples = sorted(result["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    return [float(choice[0]) for sample in samples for choice in sample["filtered_resps"]]


@torch.no_grad()
def expected(model: nn.Module, tokenizer: Any) -> list[float]:
    found = []
    for row in ROWS:
        for choice in row["choices"]:
            prompt, answer = tokenizer(row["question"])["input_ids"], tokenizer.convert_tokens_to_ids(choice)
            found.append(float(model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[answer]))
    return found


@pytest.mark.parametrize("to", ["merged", "peft"])
def test_log_likelihoods(run: Path, to: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    ours = expected(rebuild_task(run / "x.ckpt").eval().adapted, tokenizer)
    found = evaluated(run, run / to) if to == "merged" else evaluated(run, run / "base", run / to)
    assert found == pytest.approx(ours, abs=1e-4)
    control = evaluated(run, run / "base")
    assert max(abs(one - other) for one, other in zip(control, ours, strict=True)) > 0.1  # negative control
