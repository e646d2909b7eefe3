"""The README's custom task, as it stands there, is short and does what its section says; its tables are true."""

import re
from pathlib import Path

import pytest
import torch

from lora_lightning import data, disabled, merge, methods, tasks
from lora_lightning.backbones.blocks import BLOCKS
from lora_lightning.tasks import AdapterTask, PerTokenTask
from lora_lightning.tasks.problems import PROBLEMS
from lora_lightning.tasks.text_overlap import Overlap
from tests.tasks.toys import trainer

README = Path(__file__).parent.parent / "README.md"
MARK = "<!-- This block is run by tests/test_readme.py. -->"


def custom_task_code() -> str:
    return re.match(r"\s*```python\n(.*?)```", README.read_text().split(MARK)[1], re.DOTALL).group(1)


def table(heading: str) -> list[list[str]]:
    """Return the cells of the rows of the table that starts with a column of this name."""
    rows = README.read_text().split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def logged_by(task: type[AdapterTask]) -> set[str]:
    """Return the names of what a task logs on validation beside its loss."""
    if issubclass(task, PerTokenTask):
        return {"perplexity", "accuracy"} | (set(Overlap._fields) if task is tasks.Seq2SeqLM else set())
    if task is tasks.SequenceClassification:
        problems = [task(label_names=["a", "b"], problem=name) for name in PROBLEMS]
        return set().union(*(one.configure_metrics() for one in problems))
    labels = {} if task is tasks.MultipleChoice else {"label_names": ["O", "B-X"]}
    return set(task(**labels).configure_metrics())


def test_the_table_of_tasks_is_complete_and_true():
    rows = table("task")
    concrete = {name for name in tasks.__all__ if isinstance(getattr(tasks, name), type)}
    concrete = {name for name in concrete if issubclass(getattr(tasks, name), AdapterTask)}
    assert {row[0].strip("`") for row in rows} == concrete - {"AdapterTask", "PerTokenTask"}
    assert {code_in(row[1])[0] for row in rows} == set(data.__all__)
    for row in rows:
        assert set(code_in(row[2])) == logged_by(getattr(tasks, row[0].strip("`")))


def test_the_table_of_methods_is_complete():
    named = {row[0].strip("`") for row in table("method")}
    assert named - {"LoRA+"} == set(methods.__all__)


def test_the_architectures_with_known_blocks_are_all_named():
    text = README.read_text().split("know the blocks of ")[1].split("; another")[0]
    numbered = {"qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}  # written as ranges
    assert "Qwen 2 and 3" in text
    assert "Gemma 1 to 3" in text
    named = re.sub(r"[^a-z0-9]", "", text.lower())
    assert all(name.replace("-", "") in named for name in set(BLOCKS) - numbered)
    assert len(re.findall(r",| and ", text.replace("Qwen 2 and 3", "Qwen"))) + 1 == len(BLOCKS) - 3


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
    with pytest.warns(UserWarning, match=r"Resumed with optim\.schedule 'constant' \(before: 'linear'\)"):
        again.fit(resumed, scope["loader"], ckpt_path=tmp_path / "task.ckpt", weights_only=True)
    assert again.global_step == run.global_step + len(scope["loader"])
    loaded = scope["SumModulo"].load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True).eval()
    assert torch.equal(logits(loaded, tokens), expected)
    merge(loaded.adapted)
    assert torch.allclose(logits(loaded, tokens), expected, atol=1e-5)
    assert not any("_lora_lightning" in name for name in loaded.state_dict())
