"""Options of classes and functions, read from the source without importing it."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lora_lightning.public import table

_ROOT = Path(__file__).parents[2]
_LIBRARY = "lora_lightning"
_WIDTH = 90
"""Characters of a description, at most."""

Arguments = dict[str, "Option"]


@dataclass(frozen=True)
class Option:
    """One option of a command, or setting of a class.

    Args:
        name: Its name.
        text: The first sentence of its description.
        choices: Its values if they are limited; otherwise empty.
    """

    name: str
    text: str = ""
    choices: tuple[str, ...] = ()


def options_of_class(name: str) -> Arguments:
    """Return the settings of a public class and of the classes that it forwards to, by name."""
    module = table().modules.get(name)
    return _class_options(module, name) if module else {}


def options_of_command(name: str) -> Arguments:
    """Return the options of one of this library's commands, by name."""
    module = f"{_LIBRARY}.commands.{name.replace('-', '_')}"
    for node in _parsed(_path(module)).body:
        if isinstance(node, ast.FunctionDef) and node.name == name.replace("-", "_"):
            return _with_words(_arguments(node, module), node)
    return {}


def options_of_trainer() -> Arguments:
    """Return the settings of Lightning's Trainer; none if its source is not found."""
    spec = importlib.util.find_spec("lightning")  # of the package alone, which this does not import
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [Path(folder) / "pytorch" / "trainer" / "trainer.py" for folder in folders]
    for file in filter(Path.is_file, files):
        node = _find_class(_parsed(file), "Trainer")
        init = None if node is None else _constructor(node)
        if init is not None:
            return _with_words(_arguments(init, ""), init)
    return {}


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _path(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _class_options(module: str, name: str) -> Arguments:
    """Return the settings of a class of this library, its own first."""
    node = _find_class(_parsed(_path(module)), name)
    if node is None:
        return {}
    init = _constructor(node)
    own = _fields(node, module) if init is None else _arguments(init, module)
    inherited: Arguments = {}
    if init is None or init.args.kwarg is not None:
        for base_module, base in _bases(node, module):
            inherited = {**_class_options(base_module, base), **inherited}
    described = {name: inherited[name].text for name in own.keys() & inherited.keys()}
    own = {name: replace(one, text=described.get(name, "")) for name, one in own.items()}
    return _with_words({**inherited, **own}, node)


def _find_class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)


def _fields(node: ast.ClassDef, module: str) -> Arguments:
    """Return the fields of a dataclass; of another class, none."""
    if not any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        return {}
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    own = [one for one in fields if "ClassVar" not in ast.unparse(one.annotation)]
    names = [one.target.id for one in own if isinstance(one.target, ast.Name)]
    return {name: Option(name, choices=_choices(one.annotation, module)) for name, one in zip(names, own, strict=True)}


def _arguments(function: ast.FunctionDef, module: str) -> Arguments:
    found = [*function.args.args, *function.args.kwonlyargs]
    return {one.arg: Option(one.arg, choices=_choices(one.annotation, module)) for one in found if one.arg != "self"}


def _bases(node: ast.ClassDef, module: str) -> Iterator[tuple[str, str]]:
    """Iterate over the bases that are classes of this library, with their modules."""
    for base in node.bases:
        if isinstance(base, ast.Name):
            home = _home(base.id, module)
            if home.startswith(f"{_LIBRARY}."):
                yield home, base.id


def _home(name: str, module: str) -> str:
    """Return the module that a name in a module comes from."""
    for node in _parsed(_path(module)).body:
        if isinstance(node, ast.ImportFrom) and any(one.name == name for one in node.names):
            found = node.module or ""
            return table().modules.get(name, found)  # a package gives it on from the module that defines it
    return module


def _choices(annotation: ast.expr | None, module: str) -> tuple[str, ...]:
    """Return the values of a type: of `Literal`, also behind a name, and of `bool`."""
    if annotation is None:
        return ()
    found: list[str] = []
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name) and node.id == "bool":
            found += ["true", "false"]
        elif isinstance(node, ast.Name) and module:
            found += _choices_of_alias(node.id, module)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            found += [str(one.value) for one in values if isinstance(one, ast.Constant)]
    return tuple(dict.fromkeys(found))


def _choices_of_alias(name: str, module: str) -> tuple[str, ...]:
    home = _home(name, module)
    path = _path(home)
    if not home.startswith(f"{_LIBRARY}.") or not path.is_file():
        return ()
    for node in _parsed(path).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == name and isinstance(node, ast.Assign | ast.AnnAssign):
            return _choices(node.value, home)
    return ()


def _with_words(options: Arguments, documented: ast.ClassDef | ast.FunctionDef) -> Arguments:
    """Add the descriptions in the `Args:` of a docstring to the options."""
    _, _, block = (ast.get_docstring(documented) or "").partition("Args:\n")
    block = re.split(r"\n\n?(?=\S)", block)[0]
    words = {
        name: " ".join(text.split())
        for name, text in re.findall(r"^    (\w+): ((?:.*\n?(?:     .*\n?)*))", block, re.MULTILINE)
    }
    return {name: replace(one, text=_shortened(words[name])) if name in words else one for name, one in options.items()}


def _shortened(text: str) -> str:
    """Return the first clause of a description, within the width.

    Example:
        >>> _shortened("Rank, at least 1; `all-linear` caps it. None takes 8.")
        'Rank, at least 1'
    """
    clause = re.split(r"(?<=\w)[.;](?= |$)|(?<=\w\w):(?= |$)", text)[0]
    return clause if len(clause) <= _WIDTH else clause[: _WIDTH - 1] + "…"
