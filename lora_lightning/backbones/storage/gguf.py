"""Models in llama.cpp's GGUF format: converted once to a plain folder, which every later run loads like any other."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pkgutil
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lightning.errors import BackboneError
from lora_lightning.paths import nearest_in_folder, resolve

log = logging.getLogger(__name__)

CACHE_VARIABLE = "LORA_LIGHTNING_CACHE"
SUFFIX = ".gguf"
FORMAT_VERSION = 1
"""Part of a cached folder's name: folders written by another version of this file are made anew."""

_SCHEME = "pkg://"
_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<file>.+\.gguf)\.(?:part[-_.]?)?(?P<number>\d+)", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_CHECKSUMS = "SHA256SUMS"
_BLOCK = 1 << 20


def gguf_parts(name: str) -> list[Path] | None:
    """Find the file, or the parts in order, that a backbone's name means; None where it means no GGUF model.

    Args:
        name: A `.gguf` file; a folder with one, and without a `config.json`; or either inside a package
            (`pkg://package/file.gguf`, `pkg://package`). In place of a file there may be its parts (`file.gguf.part00`,
            `file.gguf.part01`, … or `file.gguf.0`, …), beside it or, for a package, in packages of the same name with
            `_part1`, `_part2`, … appended. No package is imported.

    Raises:
        BackboneError: A `.gguf` file is named and is not there, a part is missing, or a folder holds several models.
    """
    is_named = name.lower().endswith(SUFFIX)
    folders, file_name = _places(name, is_named=is_named)
    if folders is None:
        return None
    found = _models_in(folders)
    if is_named and file_name not in found:
        known = f"there are {', '.join(sorted(found))}" if found else nearest_in_folder(folders[0] / file_name)
        raise BackboneError(f"The GGUF file {name!r} does not exist, in one piece or in parts; {known}.")
    if not found:
        return None
    if not is_named and len(found) > 1:
        raise BackboneError(f"{name!r} holds several GGUF models ({', '.join(sorted(found))}); name one of them.")
    file_name = file_name if is_named else next(iter(found))
    if _SHARD.search(file_name):
        raise BackboneError(
            f"{file_name} is one shard of a model that llama.cpp has split; join the shards with "
            "`llama-gguf-split --merge` and name the joined file."
        )
    return _in_order(file_name, found[file_name])


def gguf_folder(parts: list[Path]) -> Path:
    """Return a plain model folder, with tokenizer, that holds what a GGUF file holds; made on the first call.

    Weights are dequantized to float32. The folder lies in the cache (LORA_LIGHTNING_CACHE in the environment, else
    `lora_lightning` in XDG_CACHE_HOME or `~/.cache`) under the SHA-256 of the file's content. It appears only when it
    is complete, and several processes make it once.

    Args:
        parts: The file, or its parts in order; see `gguf_parts`.

    Raises:
        BackboneError: The file is damaged, of an architecture that transformers cannot read, or the cache cannot be
            written; a package that reading needs is missing.
    """
    _check_magic(parts[0])
    folder = _folder_of(parts)
    if (folder / "config.json").is_file():
        return folder
    _require_packages()
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "config.json").is_file():
                _convert(parts, folder)
    except OSError as error:
        raise BackboneError(
            f"{_name_of(parts)} could not be converted in the cache folder {folder.parent} ({error}); free some space "
            f"there, or name another folder with {CACHE_VARIABLE}."
        ) from error
    return folder


def gguf_config(parts: list[Path]) -> Any:  # noqa: ANN401 - transformers' config
    """Return the config of a GGUF file without converting it.

    Args:
        parts: The file, or its parts in order; see `gguf_parts`.

    Raises:
        BackboneError: It is damaged, or of an architecture that transformers cannot read.
    """
    from transformers import AutoConfig

    _check_magic(parts[0])
    folder = _folder_of(parts)
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    _require_packages()
    with tempfile.TemporaryDirectory() as place:
        # The config stands in the first part; the reader only wants a file of the whole length.
        file = Path(place, _name_of(parts))
        shutil.copyfile(parts[0], file)
        os.truncate(file, sum(path.stat().st_size for path in parts))
        try:
            config = AutoConfig.from_pretrained(place, gguf_file=file.name)
        except Exception as error:
            raise _unreadable(_name_of(parts), error) from error
    config.dtype = None  # the weights become float32
    return config


def cache_root() -> Path:
    """Return the folder under which converted models are kept."""
    own = os.environ.get(CACHE_VARIABLE)
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{general}/lora_lightning").expanduser() / "gguf"


def _places(name: str, *, is_named: bool) -> tuple[list[Path] | None, str]:
    """Return the folders in which a name's file or parts may lie, and the file's name; None for any other name."""
    if name.startswith(_SCHEME):
        package, _, inside = name.removeprefix(_SCHEME).rstrip("/").partition("/")
        if not package.isidentifier() or (inside and not is_named and not _is_folder(name)):
            return None, ""
        folders = [place for one in (package, *_part_packages(package)) for place in _package_tree(one)]
        if "/" in inside:  # a folder inside the package: nothing beside it counts
            folders = [resolve(f"{_SCHEME}{package}/{inside.rpartition('/')[0]}"), *folders]
        return (folders or None), inside.rpartition("/")[2]
    path = resolve(name)
    if is_named:
        return [path.parent], path.name
    if path.is_dir() and not (path / "config.json").is_file():
        return [path], ""
    return None, ""


def _is_folder(name: str) -> bool:
    try:
        path = resolve(name)
    except ValueError:
        return False
    return path.is_dir() and not (path / "config.json").is_file()


def _package_tree(package: str) -> list[Path]:
    """Return an installed package's folder and those directly below it."""
    spec = importlib.util.find_spec(package)
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    below = [sorted(path for path in root.iterdir() if path.is_dir()) for root in roots if root.is_dir()]
    return [*roots, *(path for paths in below for path in paths if path.name != "__pycache__")]


def _part_packages(package: str) -> list[str]:
    """Return the installed packages called as `package` with a part's number behind it."""
    pattern = re.compile(re.escape(package) + r"_part_?\d+")
    return sorted(module.name for module in pkgutil.iter_modules() if pattern.fullmatch(module.name))


def _models_in(folders: Iterable[Path]) -> dict[str, dict[int | None, Path]]:
    """Return the GGUF files in some folders by name: each as its parts by number, a whole file's number being None."""
    found: dict[str, dict[int | None, Path]] = {}
    for path in (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())):
        part = _PART.fullmatch(path.name)
        if part:
            found.setdefault(part["file"], {}).setdefault(int(part["number"]), path)
        elif path.name.lower().endswith(SUFFIX) and path.is_file():
            found.setdefault(path.name, {}).setdefault(None, path)
    return found


def _in_order(file_name: str, parts: dict[int | None, Path]) -> list[Path]:
    """Return the whole file where there is one, else all parts by their number."""
    if None in parts:
        return [parts[None]]
    numbers = sorted(number for number in parts if number is not None)
    first = min(numbers[0], 1)
    missing = sorted(set(range(first, numbers[-1] + 1)) - set(numbers))
    if missing:
        raise BackboneError(
            f"{file_name} is there in parts {', '.join(map(str, numbers))}, and part {missing[0]} is missing; "
            "install or copy all of them."
        )
    return [parts[number] for number in numbers]


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_MAGIC))
    except OSError as error:
        raise BackboneError(f"{path} cannot be read ({error.strerror}).") from error
    if start != _MAGIC:
        raise BackboneError(f"{path} is not a GGUF file: it starts with {start!r}, not with {_MAGIC!r}.")


def _folder_of(parts: list[Path]) -> Path:
    return cache_root() / f"{_digest_of(parts)[:32]}-v{FORMAT_VERSION}"


def _digest_of(parts: list[Path]) -> str:
    """Return the SHA-256 of all parts together; read once, and remembered in the cache until one of them changes.

    Raises:
        BackboneError: A list of checksums beside a part names another digest for this file.
    """
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in parts]
    note = cache_root() / "seen" / hashlib.sha256(repr(stamps).encode()).hexdigest()[:32]
    if note.is_file() and re.fullmatch(r"[0-9a-f]{64}", text := note.read_text(encoding="ascii", errors="replace")):
        return text
    digest = hashlib.sha256()
    for path in parts:
        for block in _blocks(path):
            digest.update(block)
    found = digest.hexdigest()
    expected = _expected_digest(parts)
    if expected not in (None, found):
        raise BackboneError(
            f"{_name_of(parts)} differs from its {_CHECKSUMS} (SHA-256 {found[:12]}… instead of {expected:.12}…): a "
            "part is damaged or of another version; install or copy it again."
        )
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(found, encoding="ascii")
    except OSError as error:  # only the next start is slower for it
        log.info("The digest of %s could not be noted in %s (%s).", _name_of(parts), note.parent, error)
    return found


def _expected_digest(parts: list[Path]) -> str | None:
    """Return what a SHA256SUMS file says of this model: beside a part, or in the package that the parts belong to."""
    package = re.sub(r"_part_?\d+$", "", parts[0].parent.parent.name)
    folders = [path.parent for path in parts] + [parts[0].parent.parent.parent / package / parts[0].parent.name]
    for file in (folder / _CHECKSUMS for folder in folders):
        if file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                digest, _, name = line.strip().partition(" ")
                if name.strip().lstrip("*") == _name_of(parts) and re.fullmatch(r"[0-9a-fA-F]{64}", digest):
                    return digest.lower()
    return None


def _require_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackboneError(
            f"Reading a GGUF file needs {' and '.join(missing)}; install it with pip install 'lora-lightning[gguf]'."
        )


def _convert(parts: list[Path], folder: Path) -> None:
    """Load a GGUF file through transformers and write it as a plain folder, all of it or nothing."""
    name = _name_of(parts)
    log.warning(
        "Converting %s to a plain folder in %s; this takes a minute or two for each quarter of a gigabyte, the first "
        "time only.",
        name,
        folder.parent,
    )
    start = time.perf_counter()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _one_file(parts, temporary) as file:
            _write_plain(file, temporary, name)
        for path in temporary.iterdir():
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted removal may have left
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("Converted %s in %.0f s; from now on it loads from %s.", name, time.perf_counter() - start, folder)


def _write_plain(file: Path, folder: Path, name: str) -> None:
    """Write weights, config and tokenizer of a GGUF file into a folder.

    Raises:
        BackboneError: transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except OSError:
        raise
    except Exception as error:  # transformers and gguf raise a dozen types, by where they stop
        raise _unreadable(name, error) from error
    # They say that the weights are still those of the GGUF file, and save_pretrained refuses that.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unreadable(name: str, error: Exception) -> BackboneError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return BackboneError(f"transformers cannot read {name} ({reason:.200}); it is damaged, or of an unknown kind.")


@contextmanager
def _one_file(parts: list[Path], folder: Path) -> Iterator[Path]:
    """Hand out one file with all parts, joined in `folder` for as long as the block lasts."""
    if len(parts) == 1:
        yield parts[0].resolve()
        return
    joined = folder / _name_of(parts)
    with joined.open("wb") as stream:
        for block in (block for path in parts for block in _blocks(path)):
            stream.write(block)
    try:
        yield joined
    finally:
        joined.unlink()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            yield block


def _name_of(parts: list[Path]) -> str:
    part = _PART.fullmatch(parts[0].name)
    return part["file"] if part else parts[0].name


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
