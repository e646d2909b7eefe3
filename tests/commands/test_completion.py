"""Completion: what may come next is found without torch, and shells really complete it."""

import dataclasses
import inspect
import os
import pty
import re
import select
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest

import lora_lightning
from lora_lightning.__main__ import main
from lora_lightning.commands._completion.engine import FILES, CommandLine
from lora_lightning.commands._completion.scripts import SHELLS
from lora_lightning.commands._completion.source import options_of_class, options_of_command, options_of_trainer
from lora_lightning.public import find, nameable, table

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def after(*words):
    """Return the candidates for the last of the words."""
    return [candidate for candidate, _ in CommandLine(words).candidates()]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["f"], ["fit"]),
        (["comp"], ["compare", "completion"]),
        (["fit", "--tr"], ["--trainer."]),
        (["fit", "--trainer.max_ep"], ["--trainer.max_epochs"]),
        (["fit", "--model.method.sc"], ["--model.method.scaling"]),
        (["fit", "--model.method", "DoRA", "--model.method.mag"], ["--model.method.magnitude_axis"]),
        (["fit", "--model.method=BitFit", "--model.method.sc"], []),
        (["fit", "--model", "CausalLM", "--model.prob"], []),
        (["fit", "--model", "SequenceClassification", "--model.prob"], ["--model.problem"]),
        (["fit", "--model", "lora_lightning.CausalLM", "--model.max_new"], ["--model.max_new_tokens"]),
        (["fit", "--data", "InstructionData", "--data.pack"], ["--data.packing"]),
        (["fit", "--data", "TextClassificationData", "--data.pack"], []),
        (["fit", "--config", str(CONFIGS / "qlora_llama.yaml"), "--data.pack"], ["--data.packing"]),
        (["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--data.pack"], []),
        (["fit", "-c", f"{CONFIGS}/dora_classification.yaml", "--model.method.ma"], ["--model.method.magnitude_axis"]),
        (["fit", "--config", "missing.yaml", "--data.pack"], ["--data.packing"]),
        (["fit", "--model", "Seq"], ["Seq2SeqLM", "SequenceClassification"]),
        (["fit", "--model.method", "LoRAF"], ["LoRAFA"]),
        (["fit", "--model.method.scaling", ""], ["standard", "rslora", "alpha"]),
        (["fit", "--model.optim.schedule", "c"], ["constant", "cosine"]),
        (["fit", "--model.optim.schedule=c"], ["--model.optim.schedule=constant", "--model.optim.schedule=cosine"]),
        (["fit", "--model.optim.schedule", "=", "c"], ["constant", "cosine"]),
        (["fit", "--model.optim.schedule", "="], ["constant", "linear", "cosine"]),
        (["fit", "--trainer.barebones", ""], ["true", "false"]),
        (["fit", "--trainer.callbacks+", "MergeA"], ["MergeAtEnd"]),
        (["fit", "--help", "a"], ["all"]),
        (["fit", "--config", ""], [FILES]),
        (["merge", "--out"], ["--output_dir"]),
        (["plan", "--model.optim.l"], ["--model.optim.lr", "--model.optim.lora_plus_ratio"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["unknown", "--"], []),
    ],
)  # fmt: skip
def test_what_may_come_next(words, wanted):
    assert after(*words) == wanted


def test_every_command_and_no_other_is_offered():
    assert set(after("")) == {"fit", "validate", "test", "predict", *table().commands, "--help"}
    assert after("x") == []


@pytest.mark.parametrize("name", [one for room in ("tasks", "data", "methods") for one in nameable(room)])
def test_the_settings_read_from_the_source_are_those_of_the_class(name):
    cls, options = find(name), options_of_class(name)
    assert set(options) == set(inspect.signature(cls).parameters)
    assert all(option.text for option in options.values())
    if dataclasses.is_dataclass(cls):
        assert set(options) == {field.name for field in dataclasses.fields(cls)}


def test_the_settings_of_the_trainer_are_lightnings():
    assert set(options_of_trainer()) == set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert options_of_trainer()["barebones"].choices == ("true", "false")


@pytest.mark.parametrize("name", table().commands)
def test_the_options_of_a_command_are_its_functions(name):
    function = lora_lightning.commands.load_command(name)
    assert set(options_of_command(name)) == set(inspect.signature(function).parameters)


@pytest.mark.parametrize("words", [["__complete", "fit", "--model.method", ""], ["completion", "bash"]])
def test_a_tab_imports_nothing_heavy(words):
    code = f"""
import sys
from lora_lightning.__main__ import main
assert main({words!r}) == 0
print([name for name in ("torch", "lightning", "transformers", "jsonargparse") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert len(run.stdout.splitlines()) > 5


def test_a_shell_without_a_script_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "there is no completion for 'tcsh'; known are bash, zsh, fish." in capsys.readouterr().err


@pytest.fixture
def program(tmp_path):
    """A folder with the command `lora-lightning` of this checkout, and its completion scripts."""
    root = Path(lora_lightning.__file__).parent.parent
    command = tmp_path / "lora-lightning"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec "{sys.executable}" -m lora_lightning "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    for shell, script in SHELLS.items():
        (tmp_path / f"completion.{shell}").write_text(script)
    return tmp_path


def in_bash(folder, *words):
    """Return what bash's completion function offers for the last word."""
    line = " ".join(f"'{word}'" for word in ("lora-lightning", *words))
    code = f"""
export PATH="{folder}:$PATH"
source "{folder}/completion.bash"
COMP_WORDS=({line}); COMP_CWORD={len(words)}
_lora_lightning
[ "${{#COMPREPLY[@]}}" -eq 0 ] || printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    run = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert run.stderr == ""
    return run.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["fit", "--trainer.max_"], ["--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"]),
        (["fit", "--model.method.scaling", "=", "r"], ["rslora"]),
        (["fit", "--config", "completion.b"], ["completion.bash"]),
        (["fit", "--model", "Nothing"], []),
        ([""], [*after("")]),
    ],
)
def test_bash_is_offered_the_same(program, words, wanted):
    assert in_bash(program, *words) == wanted


def typed_in_bash(folder, keys, wanted, seconds=60):
    """Type keys into an interactive bash, and return what it shows until a pattern appears."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PATH=f"{folder}:{os.environ['PATH']}", TERM="dumb", PS1="$ ")
        os.chdir(folder)
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    shown = ""
    try:
        os.write(terminal, b"bind 'set enable-bracketed-paste off'; source completion.bash; echo rea''dy\n")
        shown = _read_until(terminal, r"^ready", seconds)
        os.write(terminal, keys.encode())
        shown = _read_until(terminal, wanted, seconds)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    return shown


def _read_until(terminal, pattern, seconds):
    shown, end = "", time.monotonic() + seconds
    while not re.search(pattern, shown, re.MULTILINE):
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


@pytest.mark.filterwarnings(
    "ignore:.*use of forkpty.*:DeprecationWarning", "ignore:.*multi-threaded.*:DeprecationWarning"
)
def test_a_real_bash_completes_at_tab(program):
    assert typed_in_bash(program, "lora-lightning fit --mod\t\t\t", r"--model\.")
    shown = typed_in_bash(program, "lora-lightning fit --trainer.max_ep\t2 | cat\t", r"max_epochs 2")
    assert "lora-lightning fit --trainer.max_epochs 2" in shown


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_good_in_its_shell(shell, program):
    """By the shell's own check where it is installed; on every machine by what the script must do."""
    script = SHELLS[shell]
    assert "__complete" in script
    assert FILES in script
    assert script.count("{") == script.count("}")
    installed = shutil.which(shell)
    if installed:
        checked = subprocess.run(
            [installed, "-n", str(program / f"completion.{shell}")], capture_output=True, text=True
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def test_a_broken_script_is_found_by_the_check_of_the_shell(tmp_path):
    (tmp_path / "broken.bash").write_text(SHELLS["bash"].replace("fi\n", "", 1))
    checked = subprocess.run(["bash", "-n", str(tmp_path / "broken.bash")], capture_output=True, text=True)
    assert checked.returncode != 0
    assert "syntax error" in checked.stderr
