"""The README's custom task, as it stands there: it must be short, and do what its section says."""

import re
from pathlib import Path

import pytest
import torch

from lora_lightning import disabled, merge
from tests.tasks.toys import trainer

README = Path(__file__).parent.parent / "README.md"
MARK = "<!-- This block is run by tests/test_readme.py. -->"


def custom_task_code() -> str:
    return re.match(r"\s*```python\n(.*?)```", README.read_text().split(MARK)[1], re.DOTALL).group(1)


@pytest.fixture
def scope(tmp_path, monkeypatch):
    """Run the block in an empty folder and return its names."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    names = {"__name__": "readme_task"}
    exec(compile(custom_task_code(), str(README), "exec"), names)
    return names


def logits(task, tokens):
    with torch.no_grad():
        return task.adapted(tokens)


def test_the_class_is_at_most_thirty_lines():
    code = custom_task_code()
    body = code[code.index("class ") :].split("\n\n\n")[0]
    assert 5 < len(body.splitlines()) <= 30


def test_it_trains_and_validates_with_its_adapters(scope):
    task, run = scope["task"], scope["trainer"]
    losses = {"adapted": run.callback_metrics["val/loss"].item()}
    with disabled(task.adapted):
        losses["base"] = trainer().validate(task, scope["loader"], verbose=False)[0]["val/loss"]
    assert losses["adapted"] < 0.9 < 1.0 < losses["base"]


def test_train_and_eval_outputs_are_equal_at_dropout_0(scope):
    task, tokens = scope["task"], scope["tokens"]
    train, evaluated = logits(task.train(), tokens), logits(task.eval(), tokens)
    assert torch.allclose(train, evaluated, atol=1e-5)
    with disabled(task.adapted):
        assert not torch.allclose(train, logits(task, tokens), atol=1e-2)


# The resumed run writes its checkpoints elsewhere, on purpose.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_it_checkpoints_resumes_and_merges(scope, tmp_path):
    task, tokens, run = scope["task"], scope["tokens"], scope["trainer"]
    run.save_checkpoint(tmp_path / "task.ckpt")
    expected = logits(task.eval(), tokens)
    torch.manual_seed(2)
    resumed = scope["SumModulo"](method=scope["method"], optim=scope["Optim"](lr=1e-2, schedule="constant"))
    again = trainer(max_epochs=11, enable_checkpointing=True, default_root_dir=tmp_path / "again")
    again.fit(resumed, scope["loader"], ckpt_path=tmp_path / "task.ckpt", weights_only=True)
    assert again.global_step == run.global_step + len(scope["loader"])
    loaded = scope["SumModulo"].load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True).eval()
    assert torch.equal(logits(loaded, tokens), expected)
    merge(loaded.adapted)
    assert torch.allclose(logits(loaded, tokens), expected, atol=1e-5)
    assert not any("_lora_lightning" in name for name in loaded.state_dict())
