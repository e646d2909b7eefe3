"""Read a `.ckpt` file once: digest and content come from the same open file, and none of its code runs."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from lora_lightning.checkpoint.complete import check_checkpoint, instead_of
from lora_lightning.checkpoint.manifest import FileRecord, Manifest
from lora_lightning.errors import CheckpointError

_WANTED = ("state_dict", "hyper_parameters")
_NUM_BYTES_SHOWN = 512
"""How many of the first bytes of a file tell its kind."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """What a `.ckpt` file holds.

    Args:
        path: The file.
        content: The saved object.
        manifest: The manifest that matches it, or None without one.
        record: Length and digest of the file.
    """

    path: Path
    content: Any
    manifest: Manifest | None
    record: FileRecord


def read_file(path: Path, map_location: Any = "cpu", *, weights_only: bool = True) -> CheckpointFile:  # noqa: ANN401 - as torch.load has it
    """Read a file that `torch.save` wrote, and compare it with its manifest.

    Args:
        path: The file.
        map_location: As `torch.load` takes it.
        weights_only: False also runs code in the file; only for files that the user trusts.

    Raises:
        CheckpointError: The file is missing, damaged, differs from its manifest, or holds more than plain data.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; {_file_meant(path)}.")
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}{_others_beside(path)}.")
    while True:
        with _opened(path) as (stream, identity):
            record = _record_of(stream)
            try:
                manifest = check_checkpoint(path, record)
            except CheckpointError:
                if _identity_of(path) != identity:  # a run has replaced it since it was opened
                    continue
                raise
            content = _load(stream, path, map_location, weights_only)
            return CheckpointFile(path=path, content=content, manifest=manifest, record=record)


def read_checkpoint(path: Path) -> CheckpointFile:
    """Read the `.ckpt` of a task onto the CPU; see `read_file`.

    Returns:
        The file, whose content holds `state_dict` and `hyper_parameters`.

    Raises:
        CheckpointError: It cannot be read safely, or is not a checkpoint of a task of this library.
    """
    file = read_file(path)
    content = file.content
    missing = [key for key in _WANTED if not isinstance(content, dict) or not isinstance(content.get(key), dict)]
    if missing:
        raise CheckpointError(
            f"{path} holds no {' and no '.join(missing)}, so it was not written by a task of lora_lightning; "
            "name a .ckpt file from a run's checkpoints folder."
        )
    if "_instantiator" in content["hyper_parameters"]:
        raise CheckpointError(
            f"{path} names a function to build its task with, which a task of lora_lightning never needs; it was "
            "changed or written by something else, so it is not loaded."
        )
    return file


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int]]]:
    """Open a file once, mapped into memory so that digest and content share its pages; also return its identity."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        identity = (stat.st_dev, stat.st_ino)
        if stat.st_size == 0:  # an empty file cannot be mapped
            yield io.BytesIO(), identity
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield cast(IO[bytes], mapped), identity


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _record_of(stream: IO[bytes]) -> FileRecord:
    digest = hashlib.sha256()
    stream.seek(0)
    while block := stream.read(1 << 20):
        digest.update(block)
    return FileRecord(sha256=digest.hexdigest(), num_bytes=stream.tell())


def _load(stream: IO[bytes], path: Path, map_location: Any, weights_only: bool) -> Any:  # noqa: ANN401 - as torch.load has it
    try:
        if weights_only:
            _refuse_packed(stream)
        stream.seek(0)
        return torch.load(stream, map_location=map_location, weights_only=weights_only)
    except Exception as error:  # torch raises a dozen types, by where the file is damaged
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch recommends to run the code
            reason = "it holds more than numbers, texts and tensors, and to read that could run code"
        reason = _other_kind(stream) or reason
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read safely ({reason:.120}); it is damaged or of another kind. "
            f"{instead_of(path)}"
        ) from error


def _refuse_packed(stream: IO[bytes]) -> None:
    """Refuse archives that unpack to more than their size."""
    stream.seek(0)
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is packed, which torch never does")


def _other_kind(stream: IO[bytes]) -> str | None:
    """Say what kind of file a stream is, where its first bytes show that `torch.save` did not write it."""
    stream.seek(0)
    start = stream.read(_NUM_BYTES_SHOWN)
    if not start:
        return "it is empty"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:  # the length of a header in JSON
        return "it is a safetensors file, which holds weights alone"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file"
    characters = start.decode(errors="replace").rstrip("\ufffd")  # the last one may be cut
    is_text = all(one.isprintable() or one in "\r\n\t" for one in characters) and "\ufffd" not in characters
    return "it is a text file" if characters and is_text else None


def _file_meant(folder: Path) -> str:
    """Say which `.ckpt` file belongs to a folder that was named in its place."""
    beside = folder.with_name(f"{folder.name}.ckpt")
    if beside.is_file():
        return f"name the .ckpt file that stands beside it, {beside}"
    found = sorted([*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")])
    if found:
        last = next((file for file in found if file.name == "last.ckpt"), found[-1])
        return f"name a .ckpt file inside, such as {last}"
    return "name a .ckpt file, such as runs/version_0/checkpoints/last.ckpt"


def _others_beside(path: Path) -> str:
    found = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
    return f"; in its folder are {', '.join(file.name for file in found[:5])}" if found else ""
