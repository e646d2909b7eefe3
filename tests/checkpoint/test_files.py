"""A reader sees all of a file or folder, or nothing; what was there stays when writing fails."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lora_lightning.checkpoint import files
from lora_lightning.checkpoint.files import atomic_folder, remove_folder, sha256_file, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sha256_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 1000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 1000).hexdigest()
    assert sha256_file(path) != hashlib.sha256(b"abd" * 1000).hexdigest()


def test_write_atomically_replaces(tmp_path: Path) -> None:
    path = tmp_path / "data"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["data"]


def test_write_atomically_keeps_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    write_atomically(path, b"old")

    def fail(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["data"]


def test_atomic_folder_appears_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with atomic_folder(folder) as temporary:
        (temporary / "x").write_text("1")
        assert not folder.exists()
    assert names(folder) == ["x"]
    assert names(folder.parent) == ["b"]


def test_atomic_folder_replaces_a_folder_and_a_link(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (folder / "old").write_text("1")
    link.symlink_to(folder)
    for target in (folder, link):
        with atomic_folder(target) as temporary:
            (temporary / "new").write_text("1")
        assert names(target) == ["new"]
    assert names(tmp_path) == ["folder", "link"]


def test_atomic_folder_leaves_nothing_on_failure(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"

    def write_half() -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "x").write_text("1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert names(tmp_path) == []


def test_atomic_folder_keeps_the_old_folder_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("1")
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("I/O error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="I/O error"), atomic_folder(folder) as temporary:
        (temporary / "new").write_text("1")
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_remove_folder_spares_what_a_link_points_to(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    remove_folder(link)
    assert names(tmp_path) == ["folder"]
    remove_folder(folder)
    remove_folder(folder)
    assert names(tmp_path) == []
