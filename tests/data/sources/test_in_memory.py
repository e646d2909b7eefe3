"""Sources from Python: rows of other types, paths, and what no source can be."""

from pathlib import Path

import datasets
import numpy as np
import pytest

from lora_lightning.data import Seq2SeqData, TextClassificationData
from lora_lightning.data.sources import describe, is_in_memory, is_mixture, read_records
from lora_lightning.errors import ConfigError, DataError
from tests.data.sources.conftest import fields_of

ALL_TRAINED = {"val_size": 0, "test_size": 0}
ROWS = [{"text": "w1", "label": "a"}, {"text": "w2", "label": "b"}]


def test_rows_of_numpy_are_plain():
    rows = [{"text": np.str_("x"), "label": np.int64(1), "list": np.array([1.5]), "none": None, "in": {"a": None}}]
    (found,) = fields_of(rows)
    assert found == {"text": "x", "label": 1, "list": [1.5], "none": None, "in": {"a": None}}
    assert [type(found[name]) for name in ("label", "list")] == [int, list]
    assert fields_of([{"in": {"a": None}}]) != fields_of(datasets.Dataset.from_list([{"in": {"a": None}}]))  # control


def test_labels_of_numpy_are_learnt(tokenizer_folder):
    rows = [{"text": f"w{n}", "label": np.int64(n % 2)} for n in range(6)]
    data = TextClassificationData(rows, tokenizer=tokenizer_folder, **ALL_TRAINED)
    data.setup("fit")
    assert [one.label for one in data.examples("train")] == ["0", "1"] * 3


@pytest.mark.parametrize("form", [Path, lambda path: [Path(path)], lambda path: (path,)])
def test_paths_are_names(tmp_path, tokenizer_folder, form):
    (tmp_path / "a.csv").write_text("text,label\nw1,a\nw2,b\n")
    path = str(tmp_path / "a.csv")
    data = TextClassificationData(form(path), val={"x": Path(path)}, tokenizer=tokenizer_folder, test_size=0)
    with pytest.warns(UserWarning, match="trained on"):
        data.setup("fit")
    assert [one.line for one in data.examples("train")] == [2, 3]
    assert data.hparams["train"] in (path, [path])
    assert data.hparams["val"] == {"x": path}
    assert "text_column" in data.hparams  # control: the other settings stay


@pytest.mark.parametrize(
    "source", [(row for row in ROWS), datasets.Dataset.from_list(ROWS).to_iterable_dataset(), 7, [*ROWS, None], []]
)
def test_what_is_no_source_is_refused_in_a_sentence(tokenizer_folder, source):
    data = TextClassificationData(source, tokenizer=tokenizer_folder, **ALL_TRAINED)
    with pytest.raises(DataError, match=r"is of an unknown kind: expected a file"):
        data.setup("fit")
    assert is_in_memory(source) != (source == [])
    assert isinstance(describe(source), str)


def test_nothing_to_train_on_is_a_sentence(tokenizer_folder):
    data = TextClassificationData(None, val=ROWS, tokenizer=tokenizer_folder)
    with pytest.raises(ConfigError, match="train names no source"):
        data.setup("fit")


@pytest.mark.parametrize(
    "entry",
    [
        {"source": "a.csv"},
        {"source": "a.csv", "wieght": 2},
        {"source": "a.csv", "weight": 2, "name": "a"},
        {"source": ["a.csv", "b.csv"], "share": 2},
    ],
)
def test_mistakes_in_mixtures_are_sentences(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv"):
        Path(name).write_text("text,label\nw1,a\nw2,b\n")
    other = {**entry, "source": "b.csv"}
    with pytest.raises(
        ConfigError, match=r"train has the part .*: expected a source and a weight above 0, and nothing"
    ):
        TextClassificationData([entry, other])


def test_rows_with_a_source_are_no_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w1").write_text("")
    rows = [{"source": "w1", "target": "w2"}, {"source": "w" * 5000, "target": "w3"}, {"source": "\0", "target": "w"}]
    assert not is_mixture(rows)
    assert len(list(read_records(rows))) == 3
    Seq2SeqData(rows)
