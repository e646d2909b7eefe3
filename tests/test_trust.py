"""Strict mode: what a config, a flag or a checkpoint names is imported only from the allowed list."""

import sys
from pathlib import Path

import jsonargparse
import pytest
import torch

import tests.cli_toys
import tests.tasks.toys  # noqa: F401 - classes that are imported already, which outside strict mode is enough
from lora_lightning.__main__ import main
from lora_lightning.checkpoint.task_class import find_task_class
from lora_lightning.errors import ConfigError
from lora_lightning.optim import Optim
from lora_lightning.tasks.settings import methods_from
from lora_lightning.trust import USUAL, VARIABLE, allowed_prefixes, be_strict, check_import, check_module, is_allowed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]

CANARY = "from pathlib import Path\nPath('pwned').write_text('')\n"
METHOD = "{class_path: LoRA, init_args: {r: 2, target_modules: ['2']}}"
MODEL = f"{{class_path: tests.cli_toys.ToyTask, init_args: {{method: {METHOD}"
QUIET = ["--trainer.accelerator=cpu", "--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
FIT = ["fit", *QUIET, "--data", "ToyData"]


@pytest.fixture(autouse=True)
def policy(monkeypatch, tmp_path):
    """Undo strict mode after each test, which a process otherwise keeps; make an `evil` module importable."""
    settings = jsonargparse._common.parsing_settings
    for name in ("import_path_verdicts", "import_paths_enforced"):
        monkeypatch.setitem(settings, name, settings[name])
    monkeypatch.setenv(VARIABLE, "torch.optim, tests.cli_toys")
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(CANARY)
    yield tmp_path
    sys.modules.pop("evil", None)


def refused(capsys, *arguments):
    status = main(list(arguments))
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert not Path("pwned").exists()
    return error


def test_what_is_allowed_trains():
    assert main([*FIT, "--model", MODEL + "}}"]) == 0
    optimizer = "}, optim: {optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 0.9}}}}}"
    assert main([*FIT, "--model", MODEL.removesuffix("}") + optimizer]) == 0
    assert main([*FIT, "--model", "ToyTask", "--model.method", "LoRA", "--model.method.r=1"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "evil.Task"],
        ["--model", "{class_path: evil.Task}"],
        ["--model", MODEL.replace("LoRA", "evil.Method") + "}}"],
        ["--model", MODEL.removesuffix("}") + "}, optim: {optimizer: {class_path: evil.SGD}}}}"],
        ["--model", MODEL + "}}", "--data", "evil.Data"],
        ["--model", MODEL + "}}", "--trainer.callbacks", "{class_path: evil.Callback}"],
        ["--model", MODEL + "}}", "--trainer.logger", "[{class_path: evil.Logger}]"],
        ["--model", MODEL + "}}", "--trainer.strategy", "{class_path: evil.Strategy}"],
    ],
)
def test_what_is_not_allowed_is_not_imported(capsys, monkeypatch, arguments):
    line = refused(capsys, *FIT, *arguments)
    assert "names evil." in line
    assert "takes classes from lora_lightning, torch.optim, tests.cli_toys only" in line
    assert "evil" not in sys.modules


def test_without_strict_mode_a_config_is_code(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert main([*FIT, "--model", "evil.Task"]) == 2
    assert Path("pwned").exists()


def test_callables_are_asked_for_too(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "tests.cli_toys,lightning.pytorch.callbacks")
    for name in ("evil.run", "lightning.pytorch.callbacks.lambda_function.os.getcwd"):
        callback = f"{{class_path: LambdaCallback, init_args: {{on_fit_start: {name}}}}}"
        line = refused(capsys, *FIT, "--model", MODEL + "}}", "--trainer.callbacks", callback)
        assert name.rpartition(".")[0] in line


def test_short_names_and_names_that_lead_elsewhere_are_asked_for_too(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch.optim")
    assert "`data` names tests.cli_toys.ToyData" in refused(capsys, *FIT, "--model", MODEL + "}}")
    for name in ("lora_lightning.commands._compare.runner.subprocess.Popen", "lora_lightning.cli.L.Trainer"):
        refused(capsys, *FIT, "--model", name)
    with pytest.raises(ConfigError, match=r"names torch\.nn"):
        Optim(optimizer={"class_path": "torch.nn.Linear"})


def test_a_config_cannot_loosen_it(capsys):
    Path("a.yaml").write_text(f"strict: false\nmodel: {MODEL}}}}}\n")
    assert "unknown key `strict`" in refused(capsys, *FIT, "--config", "a.yaml")
    Path("b.yaml").write_text(f"{VARIABLE}: evil\nmodel: evil.Task\n")
    refused(capsys, *FIT, "--config", "b.yaml")


def test_the_flag_allows_the_usual_classes_and_children_inherit_it(capsys, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    line = refused(capsys, *FIT, "--model", MODEL + "}}", "--data", "evil.Data", "--strict")
    assert "names evil.Data" in line
    assert allowed_prefixes() == ("lora_lightning", *USUAL)
    be_strict()
    assert not is_allowed("evil.Task")
    assert not is_allowed("lora_lightning_evil.Task")
    assert is_allowed("lora_lightning.methods.lora.LoRA")


def test_the_flag_keeps_a_list_that_is_set():
    be_strict()
    assert allowed_prefixes() == ("lora_lightning", "torch.optim", "tests.cli_toys")


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), (" , ", "is empty"), ("torch, a b", "holds 'a b'")])
def test_a_list_that_says_nothing_refuses_everything(capsys, monkeypatch, text, words):
    monkeypatch.setenv(VARIABLE, text)
    assert words in refused(capsys, *FIT, "--model", "ToyTask")
    with pytest.raises(ConfigError, match=VARIABLE):
        check_import("torch.optim.SGD", "x")


def test_checkpoints_and_manifests_name_allowed_classes_only(monkeypatch):
    with pytest.raises(ConfigError, match=r"--task_class names evil\.Task"):
        find_task_class(None, "evil.Task", Path("a.ckpt"))
    with pytest.raises(ConfigError, match=r"a\.ckpt names tests\.tasks\.toys\.Tagger"):
        find_task_class("tests.tasks.toys.Tagger", None, Path("a.ckpt"))
    with pytest.raises(ConfigError, match=r"method names tests\.tasks\.toys\.Recorder"):
        methods_from({"class_path": "tests.tasks.toys.Recorder", "init_args": {}})
    monkeypatch.delenv(VARIABLE)
    assert methods_from({"class_path": "tests.tasks.toys.Recorder", "init_args": {}})
    assert "evil" not in sys.modules


def test_a_checkpoint_may_not_name_what_builds_its_task(capsys, monkeypatch):
    settings = {"_class_path": "tests.cli_toys.ToyTask", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save({"state_dict": {}, "hyper_parameters": settings}, "a.ckpt")
    line = refused(capsys, "merge", "--ckpt_path", "a.ckpt", "--output_dir", "out")
    assert "names a function to build its task with" in line


def test_a_module_is_asked_for_as_a_whole(monkeypatch):
    check_module("tests.cli_toys", "--import")
    check_module("torch.optim.adam", "--import")
    for name in ("evil", "torch", "torch.optimal"):  # a class without a dot imports nothing, a module does
        with pytest.raises(ConfigError, match=f"--import names {name}, which strict mode does not allow"):
            check_module(name, "--import")
    assert is_allowed("evil")
    monkeypatch.delenv(VARIABLE)
    check_module("evil", "--import")
