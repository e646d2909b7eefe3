"""Distinguish complete from damaged checkpoints, find the newest, and clean up after a killed process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lora_lightning.checkpoint.files import alone_in, hidden_entries, hidden_siblings, remove, sync
from lora_lightning.checkpoint.folder import is_adapter_folder
from lora_lightning.checkpoint.manifest import FileRecord, Manifest, check_files, difference_from, read_manifest
from lora_lightning.checkpoint.pair import SUFFIX, folder_of, replace_link
from lora_lightning.errors import CheckpointError


def check_checkpoint(path: Path, found: FileRecord | None = None) -> Manifest | None:
    """Compare a `.ckpt` with the manifest that was written with it.

    Args:
        path: The file.
        found: Length and digest of the file, if the caller knows them; None reads the file.

    Returns:
        The manifest; None without a manifest, or if it is of a version that did not record the `.ckpt`.

    Raises:
        CheckpointError: They differ, or the manifest is damaged; the message names the newest complete one beside it.
    """
    try:
        return vouching_manifest(path, found)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {instead_of(path)}".strip()) from error


def vouching_manifest(path: Path, found: FileRecord | None = None) -> Manifest | None:
    """Return the manifest that names a `.ckpt`; see `check_checkpoint`.

    It is in the folder beside the file, or in a hidden folder if a process was killed between two renames.
    """
    path = path.resolve()  # `last.ckpt` may be a link: what it points to has its own folder
    folder, seen = folder_of(path), None
    while is_adapter_folder(folder) and (manifest := read_manifest(folder)) != seen:  # a run may be saving right now
        if manifest.checkpoint is None:
            return None
        difference = difference_from(manifest.checkpoint, path, found)
        if difference is None:
            return manifest
        hidden, seen = _hidden_manifest(path, found), manifest
        if hidden is not None:
            return hidden
    if seen is None:
        return _hidden_manifest(path, found)
    raise CheckpointError(f"{path} {difference}.")


def _hidden_manifest(path: Path, found: FileRecord | None) -> Manifest | None:
    for entry in hidden_siblings(folder_of(path)):
        try:
            manifest = read_manifest(entry)
        except CheckpointError:  # half written, or half removed
            continue
        if manifest.checkpoint is not None and difference_from(manifest.checkpoint, path, found) is None:
            return manifest
    return None


def newest_complete(folder: Path, *, without: Path | None = None) -> Path | None:
    """Return the newest `.ckpt` of a folder that matches its manifest and has a complete adapter folder.

    Args:
        folder: A run's `checkpoints` folder; it may be missing.
        without: A file to skip.
    """
    return next((path for path in newest_first([folder]) if path != without and is_complete(path)), None)


def is_complete(path: Path) -> bool:
    """Return whether a `.ckpt` and every file of its adapter folder match the manifest."""
    try:
        manifest = vouching_manifest(path)
        if manifest is None:
            return False
        check_files(folder_at(path, manifest), manifest)
    except (CheckpointError, OSError):
        return False
    return True


def instead_of(path: Path) -> str:
    """Return the sentence that names the newest complete checkpoint beside one that cannot be used."""
    other = newest_complete(path.parent, without=path)
    if other is None:
        return "There is no complete one beside it."
    manifest = vouching_manifest(other)
    assert manifest is not None
    return f"The newest complete one beside it is {other} (step {manifest.step})."


def recover(folder: Path) -> None:
    """Complete the renames that a killed process had begun in a folder of checkpoints, and remove its other files.

    It does nothing while another process is saving there.

    Args:
        folder: A run's `checkpoints` folder; it may be missing.
    """
    if not folder.is_dir():
        return
    with alone_in(folder) as is_alone:
        if not is_alone:
            return
        for path in [*folder.glob(f"*{SUFFIX}")]:
            if path.is_symlink():
                _recover_link(path)
            else:
                _recover_folder(path)
        remove(*hidden_entries(folder))
        sync(folder)


def _recover_folder(path: Path) -> None:
    """Rename the folder that was written with a `.ckpt` to its final name, if that is missing."""
    folder = folder_of(path)
    hidden = [entry for entry in hidden_siblings(folder) if is_adapter_folder(entry)]
    if not hidden:
        return
    try:
        manifest = vouching_manifest(path)
    except CheckpointError:  # damaged, which loading it will say
        return
    if manifest is None or (is_adapter_folder(folder) and _is_of(folder, manifest)):
        return
    source = next(entry for entry in hidden if _is_of(entry, manifest))
    if folder.exists() or folder.is_symlink():
        remove(folder)
    source.rename(folder)


def _recover_link(link: Path) -> None:
    """Point the link of the folder to the target of the `.ckpt`'s link."""
    target, folder = folder_of(link.resolve()), folder_of(link)
    if is_adapter_folder(target) and folder.resolve() != target:
        replace_link(target, folder)


def folder_at(path: Path, manifest: Manifest) -> Path:
    """Return the adapter folder of a `.ckpt` whose manifest is known: the one beside it, or a hidden one."""
    folder = folder_of(path.resolve())
    return next(entry for entry in (folder, *hidden_siblings(folder)) if _is_of(entry, manifest))


def _is_of(folder: Path, manifest: Manifest) -> bool:
    try:
        return read_manifest(folder) == manifest
    except CheckpointError:
        return False


def newest_first(folders: Iterable[Path]) -> list[Path]:
    """Return the `.ckpt` files of some folders, complete or not, the newest first."""
    files = [path for folder in folders for path in folder.glob(f"*{SUFFIX}") if path.is_file()]
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
