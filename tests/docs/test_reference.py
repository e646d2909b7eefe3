"""The reference has every public name, setting and metric, and everything public has a docstring."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from lora_lightning import tasks
from lora_lightning.commands import load_command
from lora_lightning.public import classes_of, find, table
from lora_lightning.tasks.problems import PROBLEMS
from tests.docs.pages import DOCS
from tests.test_readme import logged_by

ROOT = DOCS.parent


def load_pages():
    spec = importlib.util.spec_from_file_location("reference_pages", DOCS / "reference_pages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of their annotations
    spec.loader.exec_module(module)
    return module


PAGES = load_pages()
CONFIGURABLE = [name for room in PAGES.ROOMS for name in classes_of(room) if name not in PAGES.HELPERS]


class Half:
    """A class that leaves a setting unexplained.

    Args:
        told: What it is.
    """

    def __init__(self, told: int = 1, silent: str | None = None) -> None:
        pass


def test_a_setting_without_an_explanation_is_seen():
    settings = {one.name: one for one in PAGES.settings_of(Half)}
    assert settings["told"] == PAGES.Setting("told", "int", "1", "What it is.")
    assert settings["silent"] == PAGES.Setting("silent", "str | None", "null", "")


@pytest.mark.parametrize("name", CONFIGURABLE)
def test_every_setting_of_a_class_is_explained(name):
    settings = PAGES.settings_of(find(name))
    of_lightning = [one for one in settings if one.name.startswith("theme.")]  # of its progress bar
    assert [one.name for one in settings if not one.text and one not in of_lightning] == []


@pytest.mark.parametrize("name", table().commands)
def test_every_argument_of_a_command_is_explained(name):
    settings = PAGES.settings_of(load_command(name))
    assert settings
    assert [one.name for one in settings if not one.text] == []


def test_the_reference_has_every_public_name():
    text = PAGES.api_page()
    assert [name for name, module in table().modules.items() if f"   {module}.{name}\n" not in text] == []
    assert "lora_lightning.errors.ConfigError" in text


def test_the_table_of_metrics_is_complete_and_true():
    rows = re.findall(
        r"^\| `(\w+)`(?:, problem `(\w+)`)? \| (`val/.*) \|$", (DOCS / "reference/metrics.md").read_text(), re.M
    )
    listed: dict[str, set[str]] = {}
    for task, _, cells in rows:
        listed.setdefault(task, set()).update(re.findall(r"`val/(\w+)`", cells.partition(";")[0]))
    concrete = {name for name in classes_of("tasks") if name not in {"AdapterTask", "PerTokenTask", *PAGES.HELPERS}}
    assert listed.keys() == concrete
    assert {problem for _, problem, _ in rows} == {"", *PROBLEMS}
    for task, names in listed.items():
        assert names == logged_by(getattr(tasks, task)), task


def undocumented(source: str) -> list[str]:
    """Return the public modules, classes and functions of a source that have no docstring."""
    found: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        if not ast.get_docstring(node):
            found.append(name)
        for child in getattr(node, "body", []):
            is_public = not getattr(child, "name", "_").startswith("_")
            is_class = isinstance(node, ast.Module | ast.ClassDef)
            if is_class and isinstance(child, ast.ClassDef | ast.FunctionDef) and is_public and not is_overload(child):
                visit(child, f"{name}.{child.name}")

    visit(ast.parse(source), "module")
    return found


def is_overload(node: ast.AST) -> bool:
    """Return whether a definition only repeats the signature of another."""
    decorators = [ast.unparse(one) for one in getattr(node, "decorator_list", [])]
    return any(name.endswith((".setter", "overload")) for name in decorators)


def test_missing_docstrings_are_seen():
    source = '"""Module."""\nclass A:\n    def f(self): pass\n    def _g(self): pass\ndef h():\n    """H."""\n'
    assert undocumented(source) == ["module.A", "module.A.f"]


def test_everything_public_has_a_docstring():
    files = sorted((ROOT / "lora_lightning").rglob("*.py"))
    missing = {str(path.relative_to(ROOT)): undocumented(path.read_text(encoding="utf-8")) for path in files}
    assert len(missing) > 200
    assert {path: names for path, names in missing.items() if names} == {}


def test_pages_that_are_up_to_date_keep_their_time(tmp_path: Path):
    (tmp_path / "commands.md").write_text("old", encoding="utf-8")
    PAGES.write_all(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    PAGES.write_all(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert (tmp_path / "commands.md").read_text(encoding="utf-8").startswith("# Commands")
