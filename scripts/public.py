"""Write the static table of public names and commands, and what the README lists of them, from the source alone.

A name is public if the file that defines it lists it in `__all__`; a command is a file in `commands/`. Nothing is
imported: the files are parsed. `--check` writes nothing and ends with status 1 where something is out of date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lora_lightning"
HEAD = '"""The public names, a line each, and the commands with their help. Written by scripts/public; do not edit."""'
START = "<!-- The table below is written by scripts/public from the `about` of each method. -->\n"
END = "<!-- The table above is written by scripts/public. -->\n"
FIRST = ("LoRA", "LoRA+")
"""The rows that stand first; the others follow by the alphabet."""


def table_text(root: Path) -> str:
    """Return the static table, `__init__.pyi`."""
    names = sorted(_name_lines(root), key=str.lower)
    return "\n".join([HEAD, "", *names, "", "__version__: str", "", *_command_lines(root), ""])


def readme_text(root: Path) -> str:
    """Return the README with its table of methods."""
    text = (root / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    about = dict(_abouts(root))
    names = sorted(about, key=lambda name: (name not in FIRST, name.lower()))
    rows = [f"| {_title(name)} | {about[name]['trains']} | {about[name]['where']} |" for name in names]
    table = ["| method | what it trains | where |", "|---|---|---|", *rows]
    return before + START + "\n" + "\n".join(table) + "\n\n" + END + after


def main() -> int:
    """Write what is out of date, or with `--check` only say so."""
    wanted = {ROOT / PACKAGE / "__init__.pyi": table_text(ROOT), ROOT / "README.md": readme_text(ROOT)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run scripts/public.")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


def _files(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Iterate over the modules of a folder, parsed."""
    for path in sorted(folder.rglob("*.py")):
        if not path.name.startswith("__"):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def _module(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def _name_lines(root: Path) -> Iterator[str]:
    for path, tree in _files(root / PACKAGE):
        for name in _public_names(tree):
            yield f"from {_module(path, root)} import {name} as {name}"


def _public_names(tree: ast.Module) -> list[str]:
    """Return what a module lists in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


def _command_lines(root: Path) -> Iterator[str]:
    for path in sorted((root / PACKAGE / "commands").glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == path.stem:
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                yield f"# command {node.name.replace('_', '-')}: {summary}"


def _abouts(root: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Iterate over the methods and what each says about itself."""
    for _, tree in _files(root / PACKAGE / "methods"):
        public = _public_names(tree)
        for node in tree.body:
            about = _about_of(node.body, "about") if isinstance(node, ast.ClassDef) and node.name in public else None
            if isinstance(node, ast.ClassDef) and about is not None:
                yield node.name, about
    words = root / PACKAGE / "commands" / "_compare" / "report" / "words.py"
    lora_plus = _about_of(ast.parse(words.read_text(encoding="utf-8")).body, "LORA_PLUS_WORDS")
    if lora_plus is not None:
        yield "LoRA+", lora_plus


def _about_of(body: list[ast.stmt], name: str) -> dict[str, str] | None:
    """Return the words of an assignment `<name> = About(...)`."""
    for node in body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        is_wanted = isinstance(target, ast.Name) and target.id == name
        if is_wanted and isinstance(node.value, ast.Call):
            return {str(one.arg): ast.literal_eval(one.value) for one in node.value.keywords}
    return None


def _title(name: str) -> str:
    return name if name.endswith("+") else f"`{name}`"


if __name__ == "__main__":
    sys.exit(main())
