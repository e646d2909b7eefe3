"""Classes of the user's own that a config or a flag names, in files of the current folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_lightning.__main__ import main
from tests.faults.bench import CONFIG
from tests.mistakes.lines import PREFIX, fit, mistake, works

pytestmark = pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*")

MODULES = {
    "own_task": """\
        import lightning as L
        from lora_lightning import LoRA, SequenceClassification, TextClassificationData
        class Mine(SequenceClassification): ...
        class MyData(TextClassificationData): ...
        class MyMethod(LoRA): ...
        class MyCallback(L.Callback): ...
        class Plain(L.LightningModule): ...
        def make(**settings) -> LoRA: return LoRA(**settings)
        """,
    "own_broken": "from lora_lightning import SequenceClassification\nMine = SequenceClasification\n",
    "own_program": "import sys\nsys.exit(0)\n",
}
BROKEN = (
    "The module `own_broken` fails while it is imported: NameError: name 'SequenceClasification' is not defined "
    "(own_broken.py:2). Correct the module."
)


@pytest.fixture(autouse=True)
def modules(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    for name, code in MODULES.items():
        Path(f"{name}.py").write_text("\n".join(line.strip() for line in code.splitlines()) + "\n")
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--model={}.Mine"], "model"),
        (["--data={}.MyData"], "data"),
        (["--model.method={}.MyMethod"], "model.init_args.method"),
        (["--trainer.callbacks+={}.MyCallback"], "trainer.callbacks.0"),
    ],
)
@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("own_tsk", "There is no module `own_tsk` among the installed ones and in {here}. Did you mean `own_task`?"),
        ("own_broken", BROKEN),
        ("lora_lightning.errors", "has no class `M"),
    ],
)
def test_each_key_and_each_kind(here, capsys, arguments, key, module, sentence):
    error = mistake(capsys, *fit(*(argument.format(module) for argument in arguments)))
    assert error.startswith(f"`{key.removesuffix('.0')}")
    assert sentence.format(here=here) in error


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--model=own_task.Plain", "not a subclass of lora_lightning.AdapterTask. Derive it from AdapterTask"),
        ("--model=own_task.Plain", "name one of the same module: Mine. To train it as it is, use the callback Adapter"),
        ("--data=own_task.Mine", "not a subclass of lightning.LightningDataModule."),
        ("--model.method=own_task.Mine", "not a subclass of lora_lightning.adapters.Method."),
        ("--trainer.callbacks+=own_task.Mine", "not a subclass of lightning.Callback."),
        ("--model=own_task.Mien", "The module `own_task` (own_task.py) has no class `Mien`; did you mean `Mine`?"),
        ("--model=own_task.py", "name a class of the file, not the file: own_task.Mine."),
        ("--model=./own_task.Mine", "`./own_task.Mine` is not an import path."),
        ("--model.optim.optimizer=own_broken.Mine", BROKEN),
        ("--model.optim.optimizer=own_task.Mine", "not a subclass of torch.optim.Optimizer."),
    ],
)
def test_wrong_classes(here, capsys, argument, sentence):
    assert sentence in mistake(capsys, *fit(argument))


def test_a_config_names_its_line(here, capsys):
    Path("bad.yaml").write_text(CONFIG.replace("class_path: SequenceClassification", "class_path: own_broken.Mine"))
    line = next(
        number for number, one in enumerate(Path("bad.yaml").read_text().splitlines(), 1) if "own_broken" in one
    )
    assert mistake(capsys, "fit", "--config", "bad.yaml") == f"bad.yaml, line {line}: `model`: {BROKEN}"


def test_the_blame_goes_to_the_setting_that_is_wrong(here, capsys):
    error = mistake(capsys, *fit("--trainer.max_epoch=1", "--model=own_task.Mine"))
    assert error.startswith("unknown option `--trainer.max_epoch`")
    error = mistake(capsys, *fit("--trainer.max_epochs=x", "--model.method=own_task.make"))
    assert error.startswith("trainer.max_epochs: expected an int")


@pytest.mark.parametrize("argument", ["--model=own_task.Mine", "--model.method=own_task.make"])
def test_good_ones_train(here, capsys, argument):
    works(capsys, *fit(argument, "--trainer.fast_dev_run=true"))


def test_a_program_where_a_module_is_expected(here, capsys):
    sentence = "The module `own_program` fails while it is imported: SystemExit: 0 (own_program.py:2). Put the code"
    assert sentence in mistake(capsys, *fit("--model=own_program.Mine"))
    assert sentence in mistake(capsys, *fit("--import", "own_program"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_broken", f"--import own_broken: {BROKEN}"),
        ("own_task.Mine", "`own_task` is a module, not a package. Leave out what follows it."),
        ("own_tsk", "Did you mean `own_task`?"),
        ("own_task.py", "There is no module `own_task.py`: `own_task` is a module, not a package."),
    ],
)
def test_import(here, capsys, name, sentence):
    assert sentence in mistake(capsys, *fit("--import", name))


def test_compare_says_the_same(here, capsys):
    data = CONFIG[CONFIG.index("data:") : CONFIG.index("trainer:")]
    model = "model: {class_path: SequenceClassification, init_args: {backbone: base}}\n"
    Path("compare.yaml").write_text(model + data)
    arguments = ["compare", "--config=compare.yaml", "--steps=1", "--search_steps=1"]
    assert f"{BROKEN}" in mistake(capsys, *arguments, "--methods=[own_broken.Mine]")
    assert "not a subclass of lora_lightning.adapters.Method" in mistake(
        capsys, *arguments, "--methods=[own_task.Mine]"
    )


@pytest.mark.slow  # a process of its own
def test_a_process_of_its_own(here):
    command = [sys.executable, "-m", "lora_lightning", *fit("--model=own_program.Mine")]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{PREFIX}The module `own_program` fails while it is imported: SystemExit: 0")


def test_help_still_ends_with_status_0(capsys):
    assert main(["fit", "--help"]) == 0
