"""Modules and classes of the user's own: each way in which an import fails has a sentence of its own."""

import sys

import lightning as L
import pytest

from lora_lightning.adapters import Method
from lora_lightning.errors import ConfigError
from lora_lightning.imports import MAX_LENGTH, failure_of_import, import_class, import_module, is_failure_of_import
from lora_lightning.tasks import AdapterTask
from lora_lightning.trust import VARIABLE

GOOD = """\
from collections import OrderedDict
class Mine(OrderedDict):
    class Inner(OrderedDict): ...
class Other: ...
def function(): ...
number = 3
"""
MODULES = {
    "own_good": GOOD,
    "own_name": "\nclass Mine:\n    value = undefined_thing\n",
    "own_syntax": "class Mine(\n    x =\n",
    "own_dependency": "import os\n\nimport nowhere_dependency\n",
    "own_program": "import sys\nprint('training')\nsys.exit(3)\n",
    "own_silent_program": "raise SystemExit\n",
    "own_chain": "import own_name\n",
    "own_library_call": "import json\n\njson.loads('{')\n",
    "own_long": "raise ValueError('x' * 1000 + '\\n second line')\n",
    "own_lazy": "def __getattr__(name):\n    raise RuntimeError(f'{name} needs a package')\n",
    "own_package/__init__": "",
    "own_package/inner": GOOD,
    "own_package/bad": "from os import nothing_there\n",
}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Modules of the user's own in the current folder, which comes last on the path."""
    for name, code in MODULES.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def refusal(path, expected=dict):
    with pytest.raises(ConfigError) as caught:
        import_class(path, expected, "--model")
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("own_good.Mine", "Mine"),
        ("own_good.Mine.Inner", "Mine.Inner"),
        ("own_package.inner.Mine", "Mine"),
        ("own_good.OrderedDict", "OrderedDict"),
    ],
)
def test_a_class_that_is_there(path, name):
    assert import_class(path, dict, "--model").__qualname__ == name


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere_at_all.Mine", "Run the command in the folder of nowhere_at_all.py, or install it."),
        ("own_goood.Mine", "Did you mean `own_good`?"),
        ("own_package.iner.Mine", "There is no module `own_package.iner`; did you mean `inner`?"),
        ("own_package.x.Mine", "There is no module `own_package.x`; the package `own_package` holds: bad, inner"),
        (
            "own_good.missing.Mine",
            "There is no module `own_good.missing`: `own_good` is a module, not a package. Leave out what follows it.",
        ),
    ],
)
def test_a_module_that_is_missing(path, sentence):
    error = refusal(path)
    assert error.startswith("There is no module `")
    assert error.endswith(sentence)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("own_name", "NameError: name 'undefined_thing' is not defined (own_name.py:3). Correct the module."),
        ("own_syntax", "SyntaxError: '(' was never closed (own_syntax.py:1). Correct the module."),
        (
            "own_dependency",
            "ModuleNotFoundError: No module named 'nowhere_dependency' (own_dependency.py:3). "
            "Install the package of nowhere_dependency, or correct the import.",
        ),
        ("own_chain", "NameError: name 'undefined_thing' is not defined (own_name.py:3). Correct the module."),
        ("own_program", "SystemExit: 3 (own_program.py:3). Put the code that runs a program under"),
        ("own_silent_program", "SystemExit (own_silent_program.py:1). Put the code that runs a program under"),
        ("own_library_call", "(own_library_call.py:3). Correct the module."),  # not the line of the library
    ],
)
def test_a_module_that_fails(module, sentence):
    error = refusal(f"{module}.Mine")
    assert error.startswith(f"The module `{module}` fails while it is imported: ")
    assert sentence in error
    with pytest.raises(ConfigError) as caught:
        import_module(module)
    assert str(caught.value) == error


def test_a_module_of_a_package_that_fails():
    assert "(own_package/bad.py:1)" in refusal("own_package.bad.Mine")


def test_a_long_error_is_cut_to_one_line():
    error = refusal("own_long.Mine")
    assert "\n" not in error
    assert len(error) < MAX_LENGTH + 120


def test_a_module_whose_names_are_made_when_asked_for():
    error = refusal("own_lazy.Mine")
    assert error == (
        "The module `own_lazy` fails while it is imported: RuntimeError: Mine needs a package. Correct the module."
    )


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("own_good.Mien", "The module `own_good` (own_good.py) has no class `Mien`; did you mean `Mine`?"),
        ("own_good.Xyz", "The module `own_good` (own_good.py) has no class `Xyz`; its subclasses of dict: Mine."),
        ("own_good.py", "name a class of the file, not the file: own_good.Mine."),
        ("own_good.Mine.Outer", "The class `Mine` of the module `own_good` has no class `Outer`."),
        ("own_package.Mine", "it defines no subclass of builtins.dict."),
        ("__main__.Mine", "name the script's module instead, such as my_script.Mine."),
    ],
)
def test_a_class_that_is_missing(path, sentence):
    assert refusal(path).endswith(sentence)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("own_good.Other", "is a class, but not a subclass of builtins.dict."),
        ("own_good.function", "is of the type function, not a subclass of builtins.dict;"),
        ("own_good.number", "is of the type int, not a subclass of builtins.dict;"),
    ],
)
def test_a_class_of_the_wrong_type(path, what):
    error = refusal(path)
    assert error.startswith(f"`{path}` {what}")
    assert error.endswith("name one of the same module: Mine.")


def test_the_expected_class_is_named_as_it_is_imported():
    assert "not a subclass of lora_lightning.AdapterTask." in refusal("own_good.Mine", AdapterTask)
    assert "not a subclass of lora_lightning.adapters.Method." in refusal("own_good.Mine", Method)
    assert "not a subclass of lightning.LightningDataModule." in refusal("own_good.Mine", L.LightningDataModule)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("./own_good.Mine", "is not an import path. Give names joined by dots"),
        ("own_good..Mine", "is not an import path"),
        ("test_x.<locals>.Mine", "is defined inside a function and cannot be imported. Define it in a module."),
        ("Mine", "names no module. Give the import path of the class, such as my_task.Mine."),
    ],
)
def test_what_is_no_import_path(path, sentence):
    assert sentence in refusal(path)


def test_strict_mode_is_asked_before_and_after_the_import(monkeypatch):
    monkeypatch.setenv(VARIABLE, "own_good.Mine, own_good.OrderedDict")
    assert import_class("own_good.Mine", dict, "--model").__name__ == "Mine"
    assert "--model names collections.OrderedDict, which strict mode" in refusal("own_good.OrderedDict")
    assert "--model names own_package.inner.Mine, which strict mode" in refusal("own_package.inner.Mine")
    assert "own_package" not in sys.modules


def test_failures_of_imports_are_told_from_others():
    with pytest.raises(SystemExit) as of_module:
        __import__("own_program")
    assert is_failure_of_import(of_module.value)
    assert failure_of_import(of_module.value).startswith("The module `own_program` fails")
    with pytest.raises(SystemExit) as of_function:
        sys.exit(3)
    assert not is_failure_of_import(of_function.value)
