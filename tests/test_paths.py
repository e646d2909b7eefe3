import sys
from pathlib import Path
from types import ModuleType

import pytest

from lora_lightning.errors import UserError
from lora_lightning.paths import nearest, nearest_in_folder, resolve


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package whose import would fail, so that importing it cannot go unnoticed."""
    folder = tmp_path / "toy_corpus"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "tweets.csv").write_text("text,label\n")
    (tmp_path / "toy_module.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_package_file_is_found_without_importing_the_package(package):
    assert resolve("pkg://toy_corpus/data/tweets.csv") == package / "data" / "tweets.csv"
    assert resolve("pkg://toy_corpus/data/../data/") == package / "data"
    assert resolve("pkg://toy_corpus") == package
    assert "toy_corpus" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"):  # control: importing it would have been seen
        __import__("toy_corpus")


def test_plain_paths_get_their_home_folder_only(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/a/b.csv") == tmp_path / "a" / "b.csv"
    assert resolve("a/../b.csv") == Path("a/../b.csv")
    with pytest.raises(UserError, match="home folder"):
        resolve("~no_such_user_at_all/x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pkg://toy_korpus/data", r"not installed here; the nearest installed: .*toy_corpus.*pip install toy-korpus"),
        ("pkg://toy-corpus/data", r"names no package.*nearest installed: .*toy_corpus"),
        ("pkg:///data", "names no package"),
        ("pkg://toy_corpus/data/tweet.csv", r"'data' holds no 'tweet.csv'; the nearest names there: tweets.csv"),
        ("pkg://toy_corpus/dta/tweets.csv", r"'toy_corpus' holds no 'dta'; the nearest names there: data"),
        ("pkg://toy_corpus/data/tweets.csv/x", "'tweets.csv' is a file"),
        ("pkg://toy_corpus/../secret", "leaves the package"),
        ("pkg://toy_corpus/data/../../toy_module.py", "leaves the package"),
        ("pkg://toy_corpus//etc/passwd", "leaves the package"),
        ("pkg://toy_module/x", "single module without a folder"),
    ],
)
def test_mistakes_in_package_paths_are_told(package, path, message):
    with pytest.raises(UserError, match=message):
        resolve(path)


def test_loaded_module_without_a_spec_holds_no_files(monkeypatch):
    monkeypatch.setitem(sys.modules, "toy_shell", ModuleType("toy_shell"))
    with pytest.raises(UserError, match="'toy_shell', which is not installed here"):
        resolve("pkg://toy_shell/x")


def test_namespace_packages_are_searched_in_every_folder(tmp_path, monkeypatch):
    for part in ("one", "two"):
        (tmp_path / part / "toy_space").mkdir(parents=True)
        (tmp_path / part / "toy_space" / f"{part}.txt").write_text("")
        monkeypatch.syspath_prepend(tmp_path / part)
    assert resolve("pkg://toy_space/one.txt").name == "one.txt"
    assert resolve("pkg://toy_space/two.txt").name == "two.txt"


def test_nearest_names_ignore_case_and_unlike_names():
    assert nearest("TEXT", ["label", "Text"]) == ["Text"]
    assert nearest("zzz", ["label", "text"]) == []


def test_nearest_in_folder_tells_what_there_is(tmp_path):
    assert "is empty" in nearest_in_folder(tmp_path / "x.csv")
    assert "no folder" in nearest_in_folder(tmp_path / "nowhere" / "x.csv")
    for index in range(12):
        (tmp_path / f"part{index}.bin").write_text("")
    assert nearest_in_folder(tmp_path / "zzzz").endswith("and 2 more")


def test_a_relative_path_tells_its_start(tmp_path, monkeypatch):
    """Whoever runs a command in another folder sees why a path that is right in its config is not found."""
    monkeypatch.chdir(tmp_path)
    start = f"; paths are relative to {tmp_path}"
    assert nearest_in_folder(Path("x.csv")) == f"and the folder '.' is empty{start}"
    assert nearest_in_folder(Path("nowhere/x.csv")) == f"and there is no folder 'nowhere' either{start}"
    (tmp_path / "y.csv").touch()
    assert nearest_in_folder(Path("x.csv")) == f"the nearest names there: y.csv{start}"
    assert nearest_in_folder(tmp_path / "x.csv") == "the nearest names there: y.csv"
