"""Paths as users write them: plain ones, `pkg://package/sub/file` for a file inside an installed package, `config://name`.

`config://quickstart.yaml` is the config of this name that comes with the package.
"""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_lightning.errors import UserError

_SCHEME = "pkg://"
_CONFIG_SCHEME = "config://"


def resolve(path: str) -> Path:
    """Return where a path points, without importing anything.

    Args:
        path: A plain path (a leading `~` is the home folder; it need not exist), or `pkg://package/sub/file`, which
            names a file or folder inside an installed package and must exist, or `config://name.yaml`, which names a
            config that comes with this package.

    Raises:
        UserError: The package is not installed, or holds no such file; the nearest names are given.

    Example:
        >>> resolve("pkg://lora_lightning/paths.py").name
        'paths.py'
    """
    if path.startswith(_CONFIG_SCHEME):
        return _shipped_config(path)
    if not path.startswith(_SCHEME):
        try:
            return Path(path).expanduser()
        except RuntimeError as error:
            raise UserError(f"{path!r} names a home folder that is not known; write the folder out.") from error
    package, _, inside = path.removeprefix(_SCHEME).partition("/")
    if not package.isidentifier():
        raise UserError(f"{path!r} names no package: expected pkg://package/folder/file{_nearest_package(package)}.")
    relative = posixpath.normpath(inside)
    if inside.startswith("/") or relative.split("/")[0] == "..":
        raise UserError(
            f"{path!r} leaves the package {package!r}: the path inside it may neither start with / nor with .."
        )
    folders = _package_folders(package, path)
    found = next((folder / relative for folder in folders if (folder / relative).exists()), None)
    if found is None:
        raise UserError(f"{path!r} does not exist: {_where_it_ends(folders[0], relative)}.")
    return found


def _shipped_config(path: str) -> Path:
    """Return where a config of the package is; its `.yaml` may be left out.

    Raises:
        UserError: No config has this name; the nearest names are given.
    """
    folder = Path(__file__).with_name("configs")
    names = sorted(one.name for one in folder.glob("*.yaml"))
    name = path.removeprefix(_CONFIG_SCHEME)
    found = next((one for one in (name, f"{name}.yaml") if one in names), None)
    if found is None:
        near = nearest(name, names)
        hint = f"the nearest: {', '.join(near)}" if near else f"there are {some_of(names, 50)}"
        raise UserError(f"{path!r}: no config of this name comes with the package; {hint}.")
    return folder / found


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return the names most like one that was mistyped, best first; upper and lower case count as the same.

    Example:
        >>> nearest("Txt", ["text", "label"])
        ['text']
    """
    by_lower = {other.lower(): other for other in names}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)]


def nearest_in_folder(path: Path) -> str:
    """Return the end of a sentence about a missing path: what its folder holds instead, or that it is missing too."""
    start = "" if path.is_absolute() else f"; paths are relative to {Path.cwd()}"
    folder = path.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return f"and there is no folder {str(folder)!r} either{start}"
    if not names:
        return f"and the folder {str(folder)!r} is empty{start}"
    near = nearest(path.name, names)
    found = f"the nearest names there: {', '.join(near)}" if near else f"its folder holds: {some_of(names)}"
    return found + start


def _package_folders(package: str, path: str) -> list[Path]:
    """Find a package's folders by its spec alone; a namespace package may have several."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module that is loaded but has no spec, such as __main__
        spec = None
    if spec is None:
        name = package.replace("_", "-")
        raise UserError(
            f"{path!r} needs the package {package!r}, which is not installed here{_nearest_package(package)}. "
            f"Install it (pip install {name}) or give the path of a file."
        )
    folders = [Path(location) for location in spec.submodule_search_locations or []]
    if not folders:
        raise UserError(f"{path!r}: {package!r} is a single module without a folder, so it can hold no files.")
    return folders


def _nearest_package(package: str) -> str:
    near = nearest(package.replace("-", "_"), (module.name for module in pkgutil.iter_modules()))
    return f"; the nearest installed: {', '.join(near)}" if near else ""


def _where_it_ends(folder: Path, relative: str) -> str:
    """Say which part of a missing path is the first that is not there, and what its folder holds instead."""
    parts = relative.split("/")
    whole = [folder.joinpath(*parts[: depth + 1]) for depth in range(len(parts))]
    first = next(path for path in whole if not path.exists())
    if not first.parent.is_dir():
        return f"{first.parent.name!r} is a file"
    return f"{first.parent.name!r} holds no {first.name!r}; {nearest_in_folder(first)}"


def some_of(names: Sequence[str], count: int = 10) -> str:
    """Return the first names, and how many more there are.

    Example:
        >>> some_of(["a", "b", "c"], count=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
