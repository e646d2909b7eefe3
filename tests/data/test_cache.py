import multiprocessing
import os
import time
from pathlib import Path

import pytest

from lora_lightning.data.cache import cache_folder, cached, clear, entries, key_of, parse_size, size_limit
from lora_lightning.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder that nothing is in."""
    monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def filled(size=10):
    def build(folder):
        (folder / "rows").write_bytes(b"x" * size)

    return build


def shown(folder):
    """What stands in the cache folder, beside the locks."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def aged(name, seconds):
    """An entry that was used some time ago."""
    path = cached(name, filled())
    used = time.time() - seconds
    os.utime(path, (used, used))
    return path


def test_an_entry_is_built_once(folder):
    built = []

    def entry_paths():
        return [path for path in folder.iterdir() if path.name in ("a", "b")]

    def build(aside):
        filled()(aside)
        built.append((aside, [path.name for path in entry_paths()]))

    first = cached("a", build)
    assert first == cached("a", build) == folder / "a"
    assert (first / "rows").read_bytes() == b"x" * 10
    assert len(built) == 1
    aside, there = built[0]
    assert aside != first
    assert there == []  # nobody saw half of it
    assert shown(folder) == ["a"]
    cached("b", build)
    assert len(built) == 2


def test_a_failure_leaves_nothing_and_the_next_try_builds(folder):
    def build(aside):
        filled()(aside)
        raise DataError("broken source")

    with pytest.raises(DataError, match="broken source"):
        cached("a", build)
    assert shown(folder) == []
    assert (cached("a", filled()) / "rows").exists()


def test_what_was_used_is_the_newest(folder):
    aged("a", 500)
    aged("b", 300)
    assert [entry.path.name for entry in entries()] == ["a", "b"]
    cached("a", filled())
    assert [entry.path.name for entry in entries()] == ["b", "a"]
    assert [entry.size for entry in entries()] == [10, 10]


def test_clearing_removes_the_least_recently_used(folder):
    for name, seconds in (("b", 200), ("c", 100), ("a", 300)):
        aged(name, seconds)
    assert clear(30) == []
    assert [entry.path.name for entry in clear(25)] == ["a"]
    assert shown(folder) == ["b", "c"]
    assert clear(0, spare_seconds=150)[0].path.name == "b"
    assert shown(folder) == ["c"]  # it was used within the time
    assert [entry.path.name for entry in clear()] == ["c"]
    assert shown(folder) == []


def test_building_keeps_the_cache_within_its_size(folder, monkeypatch):
    monkeypatch.setenv("LORA_LIGHTNING_CACHE_SIZE", "0.025KB")
    aged("old", 7200)
    aged("older", 9000)
    cached("recent", filled())
    assert shown(folder) == ["old", "recent"]
    cached("new", filled(20))
    assert shown(folder) == ["new", "recent"]  # too much, but what a run may have open stays


def test_entries_that_vanish_meanwhile_are_no_error(folder, monkeypatch):
    cached("a", filled())
    gone = folder / ".unfinished-gone"
    monkeypatch.setattr(Path, "glob", lambda root, _: [root / "a", gone])
    assert [entry.path.name for entry in entries()] == ["a"]
    assert cached("b", filled()) == folder / "b"


def test_an_empty_cache(folder):
    assert entries() == clear() == []
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot be written: Not a directory\. Set LORA_LIGHTNING_CACHE .* cache to"):
        cached("a", filled())


def _count_builds(folder, at_once):
    os.environ["LORA_LIGHTNING_CACHE"] = str(folder)

    def build(aside):
        time.sleep(0.3)
        (aside / "rows").write_text("rows")
        with (folder.parent / "builds").open("a") as file:
            file.write("x")

    at_once.wait()
    assert (cached("a", build) / "rows").read_text() == "rows"


def test_one_process_builds_for_all(folder):
    context = multiprocessing.get_context("fork")
    at_once = context.Barrier(3)
    others = [context.Process(target=_count_builds, args=(folder, at_once)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert (folder.parent / "builds").read_text() == "x"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_LIGHTNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lora_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lora_lightning"


def test_sizes(monkeypatch):
    assert [parse_size(text, "x") for text in ("5GB", "1.5 kb", "2TB", "0MB")] == [5 * 10**9, 1500, 2 * 10**12, 0]
    for wrong in ("5", "GB", "-1GB", "1.2.3GB", "5 bytes", ""):
        with pytest.raises(ConfigError, match="expected a number with KB, MB, GB or TB"):
            parse_size(wrong, "x")
    monkeypatch.delenv("LORA_LIGHTNING_CACHE_SIZE", raising=False)
    assert size_limit() == 20 * 10**9
    monkeypatch.setenv("LORA_LIGHTNING_CACHE_SIZE", "lots")
    with pytest.raises(ConfigError, match="LORA_LIGHTNING_CACHE_SIZE is 'lots'"):
        size_limit()


def test_keys_tell_everything_apart():
    keys = [key_of("a", "b"), key_of("ab"), key_of(["a", "b"]), key_of("b", "a"), key_of({"a": 1}), key_of({"a": "1"})]
    assert len(set(keys)) == 6
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
