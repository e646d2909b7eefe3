"""A checkpoint on disk: the `.ckpt` for resuming and its adapter folder, written and removed together.

The manifest of the folder holds the length and the SHA-256 of the `.ckpt`; a checkpoint is complete if they match. Both
are first written under hidden names and synced. Then the `.ckpt` is renamed, and after it the folder. The checkpoint is
complete from the first rename on: `complete.vouching_manifest` also looks at the hidden folder, and `recover` renames
that if the process was killed between the two.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from lora_lightning.checkpoint.files import (
    hidden_sibling,
    make_parents,
    move_into_place,
    remove,
    remove_empty,
    sync,
    sync_tree,
    writing_in,
)
from lora_lightning.checkpoint.manifest import MANIFEST_NAME, FileRecord
from lora_lightning.texts.model_card import keep_edited

SUFFIX = ".ckpt"

Fill = Callable[[Path, FileRecord], object]
"""Writes an adapter folder into an empty one, given the record of its `.ckpt`."""


def folder_of(filepath: str | Path) -> Path:
    """Return the adapter folder that belongs to a checkpoint file.

    Example:
        >>> folder_of("run/checkpoints/last.ckpt").as_posix()
        'run/checkpoints/last'
    """
    return Path(filepath).with_name(Path(filepath).name.removesuffix(SUFFIX))


def write_pair(path: Path, checkpoint: Mapping[str, Any], fill: Fill | None = None) -> None:
    """Write a checkpoint atomically: at any time, also after a kill, the old or the new one is complete.

    Args:
        path: The `.ckpt` file; an existing checkpoint is replaced.
        checkpoint: The object for `torch.save`.
        fill: Writes the adapter folder; None writes none, and removes that of an older checkpoint of the same name.

    Raises:
        OSError: The disk cannot be written; the existing checkpoint is unchanged, and no other files remain.
    """
    made = make_parents(path.parent)
    file, folder = hidden_sibling(path, "tmp"), hidden_sibling(folder_of(path), "tmp")
    try:
        with writing_in(path.parent):
            record = _save(file, checkpoint)
            if fill is None:
                with_folder_aside(path, lambda: file.replace(path))
                return
            folder.mkdir()
            fill(folder, record)
            keep_edited(folder_of(path), folder)
            sync_tree(folder)
            file.replace(path)
            sync(path.parent)
            move_into_place(folder, folder_of(path))
    except BaseException:
        if file.exists():  # else the new checkpoint stands, and its folder may still have to follow
            remove(file, folder)
        remove_empty(made)
        raise


def remove_pair(path: Path, remove_file: Callable[[], object]) -> None:
    """Remove a checkpoint and its folder, such that a killed process never leaves the folder without its file.

    Args:
        path: The `.ckpt` file.
        remove_file: Removes that file.
    """
    if not path.parent.is_dir():
        remove_file()
        return
    with writing_in(path.parent):
        with_folder_aside(path, remove_file)


def with_folder_aside(path: Path, act: Callable[[], object]) -> None:
    """Move the adapter folder of a checkpoint aside, do something to its file, then remove the folder."""
    folder = folder_of(path)
    old = None
    if folder != path and (folder.is_symlink() or (folder / MANIFEST_NAME).is_file()):
        old = hidden_sibling(folder, "old")
        folder.rename(old)
    try:
        act()
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    sync(path.parent)
    if old is not None:
        remove(old)


def replace_link(target: Path, link: Path) -> None:
    """Point a symbolic link at a file or folder beside it, and replace an existing link or file atomically."""
    new = hidden_sibling(link, "tmp")
    new.symlink_to(os.path.relpath(target, link.parent), target_is_directory=target.is_dir())
    if link.is_dir() and not link.is_symlink():
        move_into_place(new, link)
    else:
        new.replace(link)
    sync(link.parent)


def _save(file: Path, checkpoint: Mapping[str, Any]) -> FileRecord:
    """Write a new file with `torch.save`, sync it, and return its record."""
    with file.open("xb") as stream:
        sink = _Sink(stream)
        try:
            torch.save(checkpoint, cast(BinaryIO, sink))
        except RuntimeError:
            if sink.error is not None:  # torch hides it behind an error of its own
                raise sink.error from None
            raise
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(sha256=sink.digest.hexdigest(), num_bytes=sink.num_bytes)


class _Sink:
    """A file object for `torch.save` that computes the digest of the data and records errors of the system."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.stream.flush()
