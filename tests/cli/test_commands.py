"""Commands, and mistakes in their settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lora_lightning import __main__
from lora_lightning.__main__ import main
from lora_lightning.errors import DataError
from tests.cli.lines import CONFIG, QUIET, mistake, write

pytestmark = [
    # Lightning's own advice about toy data and default settings.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*`weights_only` was not set.*"),
]

REPOSITORY = Path(__file__).parent.parent.parent


# Commands. What most mistakes are told as is in the table of tests/faults.


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "merge"):
        assert re.search(rf"^  {command} +\w.*\.$", shown, re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"lora-lightning \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "x"], "unexpected words: x; settings are given as --name value"),
    ],
)
def test_mistakes_of_commands(capsys, arguments, words):
    assert words in mistake(capsys, *arguments)


def test_help_of_a_command_shows_its_docstring_and_options(capsys):
    assert main(["merge", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "plain Hugging Face folder" in shown
    assert "--output_dir" in shown


def test_help_without_heavy_imports():
    code = "import sys; from lora_lightning.__main__ import main; main(['--help']); main(['--version']); main(['x']);"
    code += "print([name for name in ('torch', 'lightning', 'transformers', 'jsonargparse') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_help_of_fit_imports_no_more_of_transformers_than_lightning_does(folder):
    # torchmetrics, which Lightning imports, looks at transformers' top module; no model code may come on top.
    code = """
import sys
import lightning.pytorch.cli
before = {name for name in sys.modules if name.split(".")[0] in ("transformers", "datasets", "sklearn", "peft")}
from lora_lightning.__main__ import main
status = main(["fit", "--help", "all"])
after = {name for name in sys.modules if name.split(".")[0] in ("transformers", "datasets", "sklearn", "peft")}
print("new:", sorted(after - before), status)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--trainer.max_epochs" in result.stdout
    assert result.stdout.splitlines()[-1] == "new: [] 0"


def test_a_real_process_ends_with_status_2_and_one_line(folder):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "lora_lightning", "fit", "--model", "SequenceClasification"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        "lora-lightning: error: unknown class `SequenceClasification` at `model`; "
        "did you mean `SequenceClassification`?\n"
    )


def test_import_of_a_module_that_a_checkpoint_names(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(folder)
    Path("named_by_import.py").write_text("VALUE = 1\n")
    assert main(["--import", "named_by_import", "--version"]) == 0
    assert sys.modules.pop("named_by_import").VALUE == 1
    assert main(["--version", "--import=named_by_import"]) == 0
    assert "named_by_import" in sys.modules
    assert "There is no module `nowhere_at_all`" in mistake(capsys, "--version", "--import", "nowhere_at_all")
    assert "--import needs the name of a module" in mistake(capsys, "--version", "--import")
    monkeypatch.setenv("LORA_LIGHTNING_ALLOWED", "other_module")
    assert "named_by_import" in mistake(capsys, "--version", "--import", "named_by_import")


# Mistakes in settings.


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    method:", "    metod:", "bad.yaml, line 9: unknown key `model.init_args.metod`; did you mean `method`?"),
        ("  max_epochs", "  max_epoch", "unknown key `trainer.max_epoch`; did you mean `max_epochs`?"),
        ("trainer:", "trainr:", "bad.yaml, line 1: unknown key `trainr`; did you mean `trainer`?"),
        ("num_points", "num_point", "unknown key `data.init_args.num_point`; did you mean `num_points`?"),
        ("{r: 2", "{rr: 2", "unknown key `model.init_args.method.init_args.rr`; did you mean `r`?"),
        ("optim: {lr", "optim: {lrr", "unknown key `model.init_args.optim.lrr`; did you mean `lr`?"),
        ("path: LoRA", "path: LoRa", "unknown class `LoRa` at `model.init_args.method`; did you mean `LoRA`?"),
        ("path: LoRA", "path: nowhere.LoRA", "`model.init_args.method`: There is no module `nowhere`"),
        ("path: ToyTask", "path: ToyTsk", "unknown class `ToyTsk` at `model`; did you mean `ToyTask`?"),
        ("path: ToyData", "path: ToyDta", "unknown class `ToyDta` at `data`; did you mean `ToyData`?"),
        ("r: 2", "r: 0", "bad.yaml, line 11: model.init_args.method.init_args.r: LoRA: r must be"),
        ("r: 2", "r: -1", "r must be an integer of at least 1, got -1"),
        ("r: 2", "r: true", "model.init_args.method.init_args.r: expected an int, got True"),
        ("alpha: 4", "alpha: 0", "alpha must be a finite number above 0, got 0"),
        ("alpha: 4", "alpha: .nan", "alpha must be a finite number above 0, got nan"),
        ("alpha: 4", "alpha: nan", "alpha: expected a number, got 'nan'"),
        ("alpha: 4", "scaling: rs", "scaling: expected one of standard, rslora, alpha, got 'rs'"),
        ("num_points: 8", "num_points: 8.5", "data.init_args.num_points: expected an int, got 8.5"),
        ("num_points: 8", "batch_size: 0", "batch_size must be at least 1, got 0"),
        ("max_epochs: 1", "max_epochs: many", "trainer.max_epochs: expected an int, got 'many'"),
        ("max_epochs: 1", "precision: 17", "trainer.precision: expected"),
        ("  class_path: ToyTask\n  init_args:", "  class_path: ToyTask\n  init_arg:", "unknown key `model.init_arg`"),
        ("data:", "data: 3\nunused:", "data: expected"),
        ("  max_epochs: 1", "  callbacks: [{class_path: MetricCurv}]", "did you mean `MetricCurve`?"),
        ("  max_epochs: 1", "  callbacks: {class_path: MetricCurve, init_args: {file: a}}", "unknown key"),
    ],
)
def test_mistakes_in_a_config(capsys, old, new, words):
    assert old in CONFIG
    assert words in mistake(capsys, "fit", "--config", write(CONFIG.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.method.metod", "3"], "metod`"),
        (["--model.method.r", "8x"], "model.init_args.method.init_args.r: expected an int, got '8x'"),
        (["--model.method.r=0"], "r must be an integer of at least 1, got 0"),
        (["--model.method", "LoRa"], "did you mean `LoRA`?"),
        (["--model.method", "Lora"], "did you mean `LoRA`?"),
        (["--model", "ToyTsk"], "did you mean `ToyTask`?"),
        (["--trainer.max_epoch", "3"], "did you mean `--trainer.max_epochs`?"),
        (["--ckpt", "x"], "unknown option `--ckpt`"),
        (["--seed_everything", "x"], "seed_everything: expected"),
        (["--config"], "config"),
        (["--trainer.max_epochs"], "max_epochs"),
    ],
)
def test_mistakes_in_flags(capsys, arguments, words):
    assert words in mistake(capsys, "fit", "--config", "good.yaml", *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: !Task x\n", "the tag `!Task` is not allowed"),
        ("- a\n- b\n", "expected a mapping (`key: value` lines) at the top, got a list"),
    ],
)
def test_mistakes_of_yaml(capsys, text, words):
    assert words in mistake(capsys, "fit", "--config", write(text))


def test_missing_config_names_the_nearest(capsys):
    line = mistake(capsys, "fit", "--config", "god.yaml")
    assert "there is no config file 'god.yaml'; nearest there: good.yaml" in line


def test_a_section_in_a_file_of_its_own(capsys):
    model = yaml.safe_load(CONFIG)["model"]
    Path("model.yaml").write_text(yaml.safe_dump(model))
    flags = ["--model", "model.yaml", "--data", "ToyData", *QUIET]
    assert main(["fit", *flags, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optim"]["lr"] == 0.01
    Path("model.yaml").write_text("class_path: ToyTask\nclass_path: ToyTask\n")
    assert "model.yaml, line 2: the key `class_path` is there twice" in mistake(capsys, "fit", *flags)
    write("model: model.yaml\n")
    assert "model.yaml, line 2: the key `class_path` is there twice" in mistake(capsys, "fit", "--config", "bad.yaml")


def test_no_model_and_no_data(capsys):
    assert "no model is given" in mistake(capsys, "fit")
    line = mistake(capsys, "fit", "--model", "ToyTask")
    assert "no data are given" in line
    assert "ToyData" in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["2"]', "[query]", "query"),
        ('["2"]', '["2", query]', "query"),
        ("r: 2", "r: 3", "2"),
    ],
)
def test_mistakes_found_in_the_model_leave_nothing_behind(capsys, old, new, words):
    assert words in mistake(capsys, "fit", "--config", write(CONFIG.replace(old, new)))


def test_debug_shows_the_traceback(capsys):
    assert main(["fit", "--config", "gone.yaml", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("lora-lightning: error: there is no config file")


@pytest.mark.parametrize("error", [DataError("two\nlines"), MisconfigurationException("two\nlines")])
def test_errors_of_users_are_one_line(capsys, monkeypatch, error):
    def fail(arguments):
        raise error

    monkeypatch.setattr(__main__, "run", fail)
    assert mistake(capsys) == "lora-lightning: error: two lines\n"


def test_bugs_keep_their_traceback():
    with pytest.raises(IndexError, match="a bug"):
        main(["fit", "--config", "good.yaml", "--model", "BuggyTask"])


def test_sigterm_without_the_guard_is_143(monkeypatch):
    def ended(*arguments):
        raise SIGTERMException

    monkeypatch.setattr(__main__, "run", ended)
    assert main(["fit"]) == 143


def test_ctrl_c_is_130(monkeypatch):
    assert main(["fit", "--config", "good.yaml", "--model", "InterruptedTask"]) == 130

    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "run", interrupt)
    assert main(["fit"]) == 130
