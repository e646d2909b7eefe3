"""Folders, lists and patterns: which files they stand for."""

import warnings

import datasets
import pandas as pd
import pytest

from lora_lightning.data.sources import ReadSettings, source_files, source_fingerprint
from lora_lightning.data.sources.files import matching
from lora_lightning.errors import DataError, UserError
from tests.data.sources.conftest import SUFFIXES, compress, fields_of, read


def names_of(source, **settings):
    return [name for _, name in source_files(source, ReadSettings(**settings))]


# Folders.


def test_folder_of_texts_takes_classes_from_its_sub_folders(tmp_path, write):
    for kind, texts in {"pos": ["good", "fine"], "neg": ["bad\n"], ".cache": ["no"]}.items():
        for index, text in enumerate(texts):
            write(f"{kind}/{index}.txt", text)
    write("pos/.hidden.txt", "no")
    (tmp_path / "notes").mkdir()
    records = read(str(tmp_path), text_column="words", label_column="kind")
    assert [record.fields for record in records] == [
        {"words": "bad\n", "kind": "neg"},
        {"words": "good", "kind": "pos"},
        {"words": "fine", "kind": "pos"},
    ]
    assert records[1].place == f"{tmp_path}/pos/0.txt, line 1"
    write("pos/0.txt", "café".encode("latin-1"))
    with pytest.raises(DataError, match=r"pos/0\.txt is not utf-8"):
        fields_of(tmp_path)
    assert fields_of(tmp_path, encoding="latin-1")[1]["text"] == "café"


def test_folders_of_files_of_several_kinds(tmp_path, write):
    write("data/b.csv", "text\nb\n")
    write("data/a.jsonl.gz", compress(b'{"text": "a"}\n', ".gz"))
    write("data/notes.md", "no")
    write("data/.hidden.csv", "no")
    assert fields_of(tmp_path / "data") == [{"text": "a"}, {"text": "b"}]
    assert [record.place for record in read(f"{tmp_path}/data/")] == [
        f"{tmp_path}/data/a.jsonl.gz, line 1",
        f"{tmp_path}/data/b.csv, line 2",
    ]
    write("words/readme.md", "no")
    with pytest.raises(DataError, match=r"holds no texts: expected one sub-folder .* files that end in \.csv"):
        fields_of(tmp_path / "words")


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_compressed_texts_of_class_folders(tmp_path, write, suffix):
    write("neg/0.txt", "bad")
    write(f"neg/1.txt{suffix}", compress(b"pire\n", suffix))
    write(f"pos/0.TXT{suffix}", compress("café".encode("latin-1"), suffix))
    write(f"pos/1.md{suffix}", "no")
    (tmp_path / "pos" / "2.txt").mkdir()
    records = read(str(tmp_path), encoding="latin-1")
    assert [(record.fields["label"], record.fields["text"]) for record in records] == [
        ("neg", "bad"),
        ("neg", "pire\n"),
        ("pos", "café"),
    ]
    assert records[1].place == f"{tmp_path}/neg/1.txt{suffix}, line 1"
    write(f"pos/0.TXT{suffix}", b"not compressed")
    with pytest.raises(DataError, match=rf"pos/0\.TXT\{suffix} cannot be read: .* Check that the file is whole"):
        fields_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "contents"),
    [
        (".csv", [f"text\n{n}\n".encode() for n in range(5)]),
        (".tsv", [f"text\tlabel\n{n}\tx\n".encode() for n in range(5)]),
        (".jsonl", [f'{{"text": "{n}"}}\n'.encode() for n in range(5)]),
        (".json", [f'[{{"text": "{n}"}}]'.encode() for n in range(5)]),
        (".yaml", [f"conversations:\n- - hi\n  - '{n}'\n".encode() for n in range(5)]),
        (".parquet", None),
        (".conll", [f"{n} O\n".encode() for n in range(5)]),
    ],
)
def test_folders_with_compressed_and_plain_files_of_one_kind(tmp_path, write, kind, contents):
    if contents is None:
        frames = [pd.DataFrame({"text": [str(n)]}) for n in range(5)]
        contents = [frame.to_parquet() for frame in frames]
    one_by_one = []
    for n, suffix in enumerate(SUFFIXES):
        path = write(f"data/{n}{kind}{suffix}", compress(contents[n], suffix))
        one_by_one += fields_of(path, conll=True)
    assert len(one_by_one) == 5
    found = fields_of(tmp_path / "data", conll=True)
    assert found == one_by_one
    assert str(found[1]) != str(found[0])  # control
    assert fields_of(f"{tmp_path}/data/*{kind}*", conll=True) == one_by_one


def test_folders_of_tagged_sentences(tmp_path, write):
    write("ner/b.conll", "b O\n")
    write("ner/a.conllu", "1\ta\t_\tNOUN\n")
    write("ner/c.IOB2.gz", compress(b"c O\n\nd B-X\n", ".gz"))
    write("ner/readme.md", "no")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = read(f"{tmp_path}/ner", conll=True)
    assert [record.fields["tokens"] for record in records] == [["a"], ["b"], ["c"], ["d"]]
    assert records[3].place == f"{tmp_path}/ner/c.IOB2.gz, line 3"
    with pytest.raises(DataError, match="holds no texts"):  # control: other tasks read no such files
        read(f"{tmp_path}/ner")
    write("deep/en/a.conll", "a O\n")
    write("deep/de/a.conll", "b O\n")
    assert names_of(f"{tmp_path}/deep", conll=True) == [f"{tmp_path}/deep/{name}/a.conll" for name in ("de", "en")]


def test_texts_in_a_folder_are_sentences_only_where_there_is_nothing_else(tmp_path, write):
    write("ner/a.txt", "a O\n")
    write("ner/b.txt.xz", compress(b"b O\n", ".xz"))
    assert [row["tokens"] for row in fields_of(tmp_path / "ner", conll=True)] == [["a"], ["b"]]
    write("ner/c.conll", "c O\n")
    with pytest.warns(UserWarning, match=r"holds a\.txt beside files of other kinds; its \.txt files are not read"):
        assert names_of(f"{tmp_path}/ner", conll=True) == [f"{tmp_path}/ner/c.conll"]
    assert len(names_of(f"{tmp_path}/ner/*", conll=True)) == 3


# Lists and patterns.


def test_lists_and_patterns(tmp_path, write, monkeypatch):
    for name in ("a.csv", "b.csv", "c.tsv", "deep/d.csv"):
        write(name, f"text\n{name}\n")
    monkeypatch.chdir(tmp_path)
    assert [row["text"] for row in fields_of(["c.tsv", "a.csv"])] == ["c.tsv", "a.csv"]
    assert names_of("*.csv") == ["a.csv", "b.csv"]
    assert names_of("**/*.csv") == ["a.csv", "b.csv", "deep/d.csv"]
    assert names_of(f"{tmp_path}/[bc].?sv") == [f"{tmp_path}/b.csv", f"{tmp_path}/c.tsv"]
    assert names_of(["deep/*", "a.csv"]) == ["deep/d.csv", "a.csv"]
    assert [record.place for record in read("deep/*.csv")] == ["deep/d.csv, line 2"]
    with pytest.raises(DataError, match=r"No file matches \*\.cvs; the nearest names there: [ab]\.csv"):
        names_of("*.cvs")
    write("[odd].csv", "text\nodd\n")
    assert fields_of("[odd].csv") == [{"text": "odd"}]


def test_files_in_packages(tmp_path, write, monkeypatch):
    write("some_package_of_rows/__init__.py", "raise ImportError")
    write("some_package_of_rows/rows/a.csv", "text\nx\n")
    monkeypatch.syspath_prepend(tmp_path)
    for source in ("rows/a.csv", "rows"):
        (record,) = read(f"pkg://some_package_of_rows/{source}")
        assert record.place == "pkg://some_package_of_rows/rows/a.csv, line 2"
    with pytest.raises(UserError, match="not installed"):
        read("pkg://no_such_package_here/a.csv")


@pytest.fixture
def package(tmp_path, write, monkeypatch):
    """The path of a package with rows, which cannot be imported."""
    write("some_package_of_tables/__init__.py", "raise ImportError")
    for name in ("a.csv", "b.csv", "[c].csv", "deep/d.csv"):
        write(f"some_package_of_tables/rows/{name}", f"text\n{name}\n")
    write("some_package_of_tables/rows/e.jsonl.bz2", compress(b'{"text": "e"}\n', ".bz2"))
    monkeypatch.syspath_prepend(tmp_path)
    return "pkg://some_package_of_tables"


def test_patterns_in_packages(package):
    assert names_of(f"{package}/rows/[ab].csv") == [f"{package}/rows/a.csv", f"{package}/rows/b.csv"]
    assert names_of(f"{package}/*/**/d.*") == [f"{package}/rows/deep/d.csv"]
    assert names_of(f"{package}/ro?s/deep") == [f"{package}/rows/deep/d.csv"]
    assert names_of(f"{package}/rows/[c].csv") == [f"{package}/rows/[c].csv"]  # a file of this name
    (record,) = read(f"{package}/*/*.bz2")
    assert (record.place, record.fields) == (f"{package}/rows/e.jsonl.bz2, line 1", {"text": "e"})
    assert len(fields_of([f"{package}/rows/deep/*", f"{package}/rows/*.csv"])) == 4
    assert source_fingerprint(f"{package}/rows/a.*", ReadSettings()) == source_fingerprint(
        f"{package}/rows/a.csv", ReadSettings()
    )
    with pytest.raises(DataError, match=r"No file matches .*rows/c\.\*; its folder holds: \[c\]\.csv, a\.csv"):
        read(f"{package}/rows/c.*")
    with pytest.raises(UserError, match="'some_package_of_tables' holds no 'row'; the nearest names there: rows"):
        read(f"{package}/row/*.csv")
    with pytest.raises(UserError, match="not installed"):
        read("pkg://no_such_package_here/*.csv")
    with pytest.raises(UserError, match="leaves the package"):
        read(f"{package}/../*.csv")


def test_patterns_in_folders_with_signs_of_patterns(tmp_path, write):
    for name in ("data [2024]/a.csv", "data [2024]/b.csv", "data 2/c.csv"):
        write(name, "text\nx\n")
    assert names_of(f"{tmp_path}/data [2024]/*.csv") == [f"{tmp_path}/data [2024]/{name}.csv" for name in "ab"]
    assert names_of(f"{tmp_path}/data [0-9]/*.csv") == [f"{tmp_path}/data 2/c.csv"]


def test_a_file_that_matches_within_a_folder_that_matches_is_read_once(tmp_path, write, monkeypatch):
    for name in ("a.csv", "deep/b.csv", "deep/er/c.csv", "deep/.hidden.csv"):
        write(name, f"text\n{name}\n")
    monkeypatch.chdir(tmp_path)
    assert names_of("**") == names_of("**/*") == ["a.csv", "deep/b.csv", "deep/er/c.csv"]
    with pytest.warns(UserWarning, match=r"deep has 1 files of data in its sub-folders .* such as er/c\.csv"):
        assert names_of("*") == ["a.csv", "deep/b.csv"]  # a folder stands for its own files
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [row["text"] for row in fields_of("~/deep/*/*.csv")] == ["deep/er/c.csv"]


def test_patterns_of_saved_data_sets(tmp_path, write):
    for name in ("one", "two"):
        datasets.Dataset.from_dict({"text": [name]}).save_to_disk(f"{tmp_path}/saved/{name}")
    write("saved/more.csv", "text\nmore\n")
    assert [row["text"] for row in fields_of(f"{tmp_path}/saved/*")] == ["more", "one", "two"]


def test_fingerprints_are_of_all_parts_of_a_list(tmp_path, write):
    file = write("a.csv", "text\nx\n")
    prints = set()
    for name in ("one", "two"):
        datasets.Dataset.from_dict({"text": [name]}).save_to_disk(f"{tmp_path}/{name}")
        prints.add(source_fingerprint([file, f"{tmp_path}/{name}"], ReadSettings()))
    assert len({*prints, source_fingerprint(file, ReadSettings())}) == 3


# What a folder holds beside what is read of it.


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (("a.csv", "more/b.jsonl.gz"), "more/b.jsonl.gz"),
        (("a.csv", "more/deep/b.csv"), "more/deep/b.csv"),
        (("pos/1.txt", "neg/1.txt", "neg/more.csv"), "neg/more.csv"),
        (("pos/1.txt", "neg/1.txt", "neg/2020/2.txt"), "neg/2020/2.txt"),
        (("a.csv", "notes.md", "more/notes.md", ".git/b.csv", "more/.b.csv"), None),
        (("pos/1.txt", "neg/1.txt", "notes.md"), None),
    ],
)
def test_data_in_sub_folders_that_is_not_read_is_warned_of(tmp_path, write, names, unread):
    for name in names:
        write(f"data/{name}", b"")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_here = names_of(f"{tmp_path}/data")
    said = f"data has 1 files of data in its sub-folders that are not read, such as {unread}."
    assert [said in str(one.message) for one in told] == ([True] if unread else [])
    assert f"{tmp_path}/data/{unread}" not in read_here


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("train.csv", "test.csv"), "test.csv and train.csv"),
        (("Train-1.csv", "valid.csv.gz", "train-2.csv"), "Train-1.csv and valid.csv.gz"),
        (("dev.jsonl", "test.jsonl"), "dev.jsonl and test.jsonl"),
        (("train.csv", "trains.csv", "latest.csv"), None),
        (("val.csv", "dev.csv"), None),
        (("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"), None),
    ],
)
def test_files_named_as_splits_are_warned_of_in_one_folder(tmp_path, write, names, named):
    for name in names:
        write(f"data/{name}", b"")
    for source in (f"{tmp_path}/data", f"{tmp_path}/data/*"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert len(names_of(source) if source.endswith("data") else matching(source)) == len(names)
        expected = [f"{source} holds {named}, and all of them are read as rows of one split."] if named else []
        assert [str(one.message).partition(" Where")[0] for one in told] == expected
