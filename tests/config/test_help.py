"""The help: short first and without torch, every setting on demand, each in its own words."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from jsonargparse import ArgumentParser

import lora_lightning
from lora_lightning.__main__ import main
from lora_lightning.cli import run_lightning
from lora_lightning.config.class_help import class_help
from lora_lightning.config.short_help import GROUPS, short_help
from lora_lightning.config.strict_yaml import load_text
from lora_lightning.errors import ConfigError
from lora_lightning.public import classes_of, nameable
from lora_lightning.tasks import AdapterTask

LINES = [line for lines in GROUPS.values() for line in lines]
TASK = [
    "--model",
    "CausalLM",
    "--model.method",
    "LoRA",
    "--model.quantization.bits",
    "4",
    "--model.optim.weight_decay",
    "0",
]
DATA = ["--data", "TextClassificationData", "--data.train", "a.csv"]


def printed(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def config():
    """The settings of a run with all defaults, as `--print_config` shows them."""
    code = f"from lora_lightning.__main__ import main; main({['fit', *TASK, *DATA, '--print_config']!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return yaml.safe_load(run.stdout)


def looked_up(config, name):
    """Return the value of a setting such as `model.method.r`, through the arguments of classes."""
    value = config
    for key in name.split("."):
        value = value.get("init_args", value)[key]
    return value


def test_the_short_help_has_about_twenty_settings_of_one_line_each(capsys):
    text = printed(capsys, "fit", "--help")
    settings = [line for line in text.splitlines() if line.startswith("  --")]
    assert len(settings) == len(LINES) <= 28
    assert max(map(len, text.splitlines())) <= 120
    assert all(re.fullmatch(r"  --\S+ [A-Z]+ +\S.*", line) for line in settings)


@pytest.mark.parametrize("line", [line for line in LINES if line.name not in ("config", "ckpt_path")], ids=str)
def test_every_line_of_the_short_help_is_a_setting_with_the_default_that_it_names(config, line):
    value = looked_up(config, line.name)
    if line.default:
        assert load_text(line.default) == value


def test_a_setting_that_is_not_there_is_found_by_the_check_above(config):
    with pytest.raises(KeyError):
        looked_up(config, "model.method.rank")


def test_only_what_an_evaluation_reads_is_in_its_short_help():
    assert "--model.optim.lr" in short_help("fit", "")
    assert "--model.optim.lr" not in short_help("test", "")
    assert "--ckpt_path" in short_help("test", "")


def test_the_short_help_names_the_classes_that_a_config_may_name():
    text = short_help("fit", "")
    tasks = nameable("tasks")
    for name in [*tasks, *classes_of("methods"), *classes_of("data")]:
        assert re.search(rf"\b{name}\b", text), name
    assert all(issubclass(getattr(lora_lightning, name), AdapterTask) for name in tasks)
    assert set(classes_of("tasks")) - set(tasks) == {"AdapterTask", "PerTokenTask", "StepOutput", "TokenSums"}


@pytest.mark.parametrize("words", [["fit", "--help"], ["predict", "-h"], ["fit", "--config", "a.yaml", "--help"]])
def test_the_short_help_imports_no_torch(words):
    code = f"import sys; from lora_lightning.__main__ import main; main({words!r}); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0].startswith(f"usage: lora-lightning {words[0]}")
    assert run.stdout.splitlines()[-1] == "False"


def options_without_words(text):
    """Return the options of a help text that it explains with nothing but their type."""
    blocks = re.findall(r"^  (--?[\w.]+)(.*)\n((?: {24}.*\n)*)", text, re.MULTILINE)
    assert blocks
    words = {name: " ".join([*re.findall(r" {2,}(\S.*)", first), *more.split()]) for name, first, more in blocks}
    return [name for name, said in words.items() if not said or said.startswith(("(type", "(default"))]


def test_all_settings_of_fit_have_words(capsys):
    text = printed(capsys, "fit", "--help", "all")
    assert text.startswith("usage: lora-lightning fit [--config FILE] [--name value ...]\n")
    assert "--trainer.gradient_clip_algorithm" in text
    assert "--guards.non_finite" in text
    assert options_without_words(text + "\n") == []


def test_an_option_without_words_is_found_by_the_check_above():
    parser = ArgumentParser(prog="x")
    parser.add_argument("--explained", type=int, default=1, help="What it does.")
    parser.add_argument("--unexplained_with_a_long_name", type=int, default=1)
    assert options_without_words(parser.format_help()) == ["--unexplained_with_a_long_name"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SequenceClassification", ["backbone", "problem", "class_weights"]),
        ("DoRA", ["r", "magnitude_axis"]),
        ("TextClassificationData", ["train", "label_column", "where"]),
        ("AdapterCheckpoint", ["monitor", "save_last"]),
    ],
)
def test_the_help_on_a_class_lists_every_setting_of_it(name, settings, capsys):
    text = printed(capsys, "fit", "--help", name)
    for setting in settings:
        assert re.search(rf"^  --{setting}\b", text, re.MULTILINE)
    assert options_without_words(text + "\n") == []


def test_help_on_an_unknown_class_names_the_nearest(capsys):
    with pytest.raises(ConfigError, match="no help on `Dora`; did you mean `DoRA`"):
        class_help("Dora")
    assert main(["fit", "--help", "al"]) == 2
    assert "`all`" in capsys.readouterr().err


def test_a_command_of_our_own_takes_help_all_too(capsys):
    assert printed(capsys, "plan", "--help", "all") == printed(capsys, "plan", "--help")


def test_all_and_help_anywhere_else_reach_the_parser():
    with pytest.raises(ConfigError, match="unexpected words: all"):
        run_lightning("fit", ["all"])


@pytest.mark.parametrize(("words", "status"), [(["--help"], 141), (["fit", "--help"], 141)])
def test_a_reader_that_ends_early_is_no_bug(words, status):
    code = f"import sys; from lora_lightning.__main__ import main; sys.exit(main({words!r}))"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        run = subprocess.run([sys.executable, "-u", "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert run.returncode == status
    assert "Traceback" not in run.stderr


def test_a_pipe_that_breaks_in_a_run_is_a_bug(monkeypatch):
    def broken(arguments):
        raise BrokenPipeError(f"while running {arguments[0]}")

    monkeypatch.setattr("lora_lightning.__main__.run", broken)
    with pytest.raises(BrokenPipeError, match="running fit"):
        main(["fit", "--config", "a.yaml"])
