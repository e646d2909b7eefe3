"""Data sets of the Hub, and fingerprints of sources of every kind."""

import datasets
import pandas as pd
import pytest

from lora_lightning.data.sources import ReadSettings, download, is_hub_name, source_fingerprint
from lora_lightning.errors import DataError
from tests.data.sources.conftest import fields_of, read


def test_what_is_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tweets").mkdir()
    for name in ("imdb", "stanfordnlp/imdb", "eriktks/conll2003"):
        assert is_hub_name(name)
    local = ["tweets", "a/b/c", "x.csv", "owner/x.JSONL", "~/x", "/x", "../x", "pkg://a/b", "a b", "x.csv.gz"]
    for source in [*local, "data/*", "data/?", "x.zst", "x.yml", "train.conll", "x.txt", ["imdb"], None, 3]:
        assert not is_hub_name(source), source


@pytest.fixture
def hub(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = {
        "train": {"text": ["a", "b"], "label": [1, 0]},
        "validation": {"text": ["c", "d"], "label": [0, -1]},
    }
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(columns, features=features) for name, columns in rows.items()}
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
    return asked


def test_hub_data_set_gives_class_names_and_its_own_splits(hub):
    rows = [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]
    assert fields_of("owner/reviews", subset="en") == rows
    assert fields_of("owner/reviews", "val") == [{"text": "c", "label": "neg"}, {"text": "d", "label": None}]
    assert hub == [("owner/reviews", "en"), ("owner/reviews", None)]
    assert read("owner/reviews")[1].place == "owner/reviews, row 2"
    assert fields_of(["owner/reviews", "owner/more"]) == rows * 2
    with pytest.raises(DataError, match="no split 'test' to use for test; it has: train, validation"):
        fields_of("owner/reviews", "test")
    download("owner/others", ReadSettings(subset="en"), "val")
    assert hub[-1] == ("owner/others", "en")


def test_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tweets_en").mkdir()

    def offline(*names):
        raise ConnectionError("Couldn't reach 'tweets' on the Hub\nTraceback ...")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"'tweets' is neither .* Couldn't reach .* nearest names there: tweets_en"
    ) as caught:
        read("tweets")
    assert "\n" not in str(caught.value)


# Fingerprints.


def fingerprint(source, role="train", **settings):
    return source_fingerprint(source, ReadSettings(**settings), role)


def test_fingerprints_are_of_the_content(write):
    first = write("a.csv", "text\nx\n")
    again = fingerprint(first)
    assert len(again) == 64
    assert fingerprint(first) == fingerprint([first]) == again
    others = [write("d.csv", "text\ny\n"), write("e.jsonl", "text\nx\n")]
    different = {fingerprint(path) for path in [first, *others, [first, first], [first, others[0]], [others[0], first]]}
    assert len(different) == 6
    write("a.csv", "text\nz\n")
    assert fingerprint(first) != again
    write("a.csv", "text\nx\n")
    assert fingerprint(first) == again


@pytest.mark.parametrize("make", [list, pd.DataFrame, datasets.Dataset.from_list])
def test_fingerprints_of_data_in_memory(make):
    rows = [{"text": "x", "n": 1}, {"text": "y", "n": 2}]
    assert fingerprint(make(rows)) == fingerprint(list(rows))
    assert fingerprint(make(rows[::-1])) != fingerprint(make(rows))
    assert fingerprint(make([rows[0], {"text": "y", "n": 3}])) != fingerprint(make(rows))


def test_fingerprints_of_folders(tmp_path, write, hub):
    for folder, kinds in (("a", ("neg", "pos")), ("b", ("neg", "pos")), ("c", ("bad", "pos"))):
        for kind in kinds:
            write(f"{folder}/{kind}/1.txt", "x")
    a, b, c = (fingerprint(f"{tmp_path}/{folder}") for folder in "abc")
    assert a == b != c  # the name of a folder is a label
    rows = datasets.Dataset.from_dict({"text": ["x", "y"]})
    for name, some in (("first", rows), ("second", rows), ("third", rows.select([0]))):
        some.save_to_disk(f"{tmp_path}/{name}")
    first, second, third = (fingerprint(f"{tmp_path}/{name}") for name in ("first", "second", "third"))
    assert first == second != third
    assert fingerprint("owner/reviews") == fingerprint("owner/reviews") != fingerprint("owner/reviews", "val")


def test_one_byte_of_a_large_file_is_enough(tmp_path):
    content = bytearray(b'{"text": "some words"}\n' * 200_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    before = fingerprint(str(path))
    content[-10] ^= 1
    path.write_bytes(content)
    assert fingerprint(str(path)) != before


def test_a_source_that_is_missing_has_no_fingerprint(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        fingerprint(str(tmp_path / "a.csv"))
