"""What all data modules of records share: examples, the cache, and what a checkpoint keeps of them."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch

from lora_lightning.data import MultipleChoiceData, Seq2SeqData, TextClassificationData, TokenClassificationData
from lora_lightning.data.cache import entries
from lora_lightning.errors import ConfigError, DataError
from tests.data.conftest import labelled
from tests.data.toys import Model, trainer

MODULES = (TextClassificationData, TokenClassificationData, MultipleChoiceData, Seq2SeqData)
ALL_TRAINED = {"val_size": 0, "test_size": 0}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder that nothing is in."""
    folder = tmp_path / "own_cache"
    monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(folder))
    return folder


@pytest.fixture
def rows_of(write):
    """A file of rows for each data module, of 1 to 10 words each."""

    def _rows_of(module, name="rows.jsonl", count=30):
        texts = labelled(count)
        if module is TextClassificationData:
            return write(name, texts)
        if module is TokenClassificationData:
            rows = [(text.split(), ["O", *["B"] * (len(text.split()) - 1)]) for text, _ in texts]
            return write(name, rows, ("tokens", "tags"))
        if module is MultipleChoiceData:
            rows = [(text, ["w1", "w2 w3"], index % 2) for index, (text, _) in enumerate(texts)]
            return write(name, rows, ("question", "choices", "label"))
        return write(name, [(text, f"w{len(text)}") for text, _ in texts], ("source", "target"))

    return _rows_of


def batches_of(data):
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in data.train_dataloader()]


def calls_of(monkeypatch, module, name):
    """A list to which each call of a method is added."""
    calls = []
    method = getattr(module, name)

    def noted(self, *arguments):
        calls.append(arguments)
        return method(self, *arguments)

    monkeypatch.setattr(module, name, noted)
    return calls


# Examples.


def test_examples_of_labelled_texts(write, tokenizer_folder):
    rows = [(text, label) for text, label in labelled(30)]
    data = TextClassificationData(
        write("a.csv", rows), predict=write("p.csv", rows[:3]), tokenizer=tokenizer_folder, **ALL_TRAINED
    )
    with pytest.raises(ConfigError, match=r"The train rows are not there: call setup\(\) first"):
        next(data.examples("train"))
    data.setup()
    found = list(data.examples("train"))
    assert [(one.text, one.label) for one in found] == rows
    assert [one.labels for one in found] == [("no", "yes").index(label) for _, label in rows]
    assert [one.ids.tolist() for one in found] == [data.tokenizer(text)["input_ids"] for text, _ in rows]
    assert [one.line for one in found] == list(range(2, 32))  # the first line has the names of the columns
    assert {Path(one.source).name for one in found} == {"a.csv"}
    predicted = list(data.examples("predict"))
    assert [(one.text, one.label, one.labels) for one in predicted] == [(text, None, None) for text, _ in rows[:3]]


def test_examples_of_tagged_sentences(write, tokenizer_folder):
    rows = [(["w1", f"id{n}"], ["O", "B"]) for n in range(4)]
    data = TokenClassificationData(
        write("a.jsonl", rows, ("tokens", "tags")), tokenizer=tokenizer_folder, **ALL_TRAINED
    )
    data.setup("fit")
    first, *_ = found = list(data.examples("train"))
    assert [(one.text, one.label, one.line) for one in found] == [(f"w1 id{n}", ("O", "B"), n + 1) for n in range(4)]
    assert data.tokenizer.convert_ids_to_tokens(first.ids) == ["[CLS]", "w1", "id0", "[SEP]"]
    assert first.labels.tolist() == [-100, 1, 0, -100]


def test_examples_of_questions(write, tokenizer_folder):
    rows = [(f"id{n}", ["w1", "w2 w3"], "AB"[n % 2]) for n in range(4)]
    columns = ("question", "choices", "label")
    data = MultipleChoiceData(write("a.jsonl", rows, columns), tokenizer=tokenizer_folder, **ALL_TRAINED)
    data.setup("fit")
    found = list(data.examples("train"))
    assert [(one.text, one.label) for one in found] == [(f"id{n}", ("w1", "w2 w3")[n % 2]) for n in range(4)]
    assert [one.labels for one in found] == [0, 1, 0, 1]


def test_examples_of_pairs(write, tokenizer_folder):
    rows = [(f"id{n} w1", f"w{n}") for n in range(4)]
    data = Seq2SeqData(
        write("a.jsonl", rows, ("source", "target")), tokenizer=tokenizer_folder, max_length=256, **ALL_TRAINED
    )
    data.setup("fit")
    first, *_ = found = list(data.examples("train"))
    assert [(one.text, one.label) for one in found] == rows
    assert data.tokenizer.convert_ids_to_tokens(first.ids) == ["[CLS]", "id0", "w1", "[SEP]"]
    assert data.tokenizer.convert_ids_to_tokens(first.labels) == ["[CLS]", "w0", "[SEP]"]


def test_pieces_of_one_text_are_examples_of_their_own(write, tokenizer_folder):
    path = write("a.csv", [("w1 w2 w3 w4 w5", "a"), ("w6", "b")])
    data = TextClassificationData(path, tokenizer=tokenizer_folder, max_length=4, too_long="split", **ALL_TRAINED)
    with pytest.warns(UserWarning, match="1 of 2 train texts of .* longer than 4 tokens and were split into pieces"):
        data.setup("fit")
    found = list(data.examples("train"))
    words = [data.tokenizer.convert_ids_to_tokens(one.ids)[1:-1] for one in found]
    assert words == [["w1", "w2"], ["w3", "w4"], ["w5"], ["w6"]]
    assert [one.line for one in found] == [2, 2, 2, 3]
    assert [one.label for one in found] == ["a", "a", "a", "b"]


# Rows that are too long.


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("too_long", ["cut", "drop", "split"])
@pytest.mark.filterwarnings("default")
def test_rows_that_are_too_long_are_counted_and_told_once(rows_of, tokenizer_folder, module, too_long, recwarn):
    settings = {"tokenizer": tokenizer_folder, "too_long": too_long, **ALL_TRAINED}
    if module is Seq2SeqData:
        settings["max_target_length"] = 128
    path = rows_of(module)
    if too_long not in module.lengths_allowed:
        with pytest.raises(ConfigError, match="too_long is 'split': expected cut or drop"):
            module(path, max_length=6, **settings)
        return
    data = module(path, max_length=6, **settings)
    data.setup("fit")
    told = [str(one.message) for one in recwarn if "longer than 6" in str(one.message) or "beyond" in str(one.message)]
    longest_choice = ("w2 w3",) if module is MultipleChoiceData else ()
    lengths = [len(data.tokenizer(text, *longest_choice)["input_ids"]) for text, _ in labelled(30)]
    num_long = sum(length > 6 for length in lengths)
    assert 0 < num_long < 30
    name = {"cut": "sources_cut" if module is Seq2SeqData else "cut", "drop": "dropped", "split": "split"}[too_long]
    assert data.counts[name] == num_long
    assert len(told) == 1
    rows = data._encoded["train"]
    assert len(rows) > 30 if too_long == "split" else len(rows) == 30 - (num_long if too_long == "drop" else 0)
    assert max(rows.lengths) <= 6
    whole = module(path, max_length=128, **settings)
    whole.setup("fit")
    assert whole.counts.get(name, 0) == 0
    assert len(whole._encoded["train"]) == 30
    assert max(whole._encoded["train"].lengths) > 6


def test_a_split_of_which_every_row_is_dropped_is_refused(write, tokenizer_folder):
    path = write("a.csv", [(f"w{n} w2 w3", "ab"[n % 2]) for n in range(6)])
    settings = {"tokenizer": tokenizer_folder, "max_length": 4, **ALL_TRAINED}
    data = TextClassificationData(path, too_long="drop", **settings)
    with pytest.raises(DataError, match=r"All 6 train rows of .*a\.csv are longer than the maximum and were dropped"):
        data.setup("fit")


def test_texts_to_predict_are_never_dropped(write, tokenizer_folder):
    path = write("a.csv", labelled(20))
    predict = write("p.csv", [("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12",), ("w1",)], ("text",))
    data = TextClassificationData(
        path, predict=predict, too_long="drop", max_length=12, tokenizer=tokenizer_folder, **ALL_TRAINED
    )
    with pytest.warns(UserWarning, match="1 of 2 predict texts of .* were cut at it"):
        data.setup("predict")
    assert data._encoded["predict"].lengths.tolist() == [12, 3]


# The cache.


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_second_setup_encodes_nothing(rows_of, tokenizer_folder, own_cache, monkeypatch, module):
    encoded = calls_of(monkeypatch, module, "encode")
    read = calls_of(monkeypatch, module, "row_of")
    path = rows_of(module)
    settings = {"tokenizer": tokenizer_folder, "max_length": 64, "batch_size": 4}

    def build(**others):
        encoded.clear()
        read.clear()
        data = module(path, **{**settings, **others})
        data.setup("fit")
        return data

    first = build()
    assert (len(encoded), len(read)) == (2, 30)  # train and val
    again = build()
    assert (len(encoded), len(read)) == (0, 0)
    assert batches_of(again) == batches_of(first)
    assert (again.counts, again.fingerprint, again.label_names) == (first.counts, first.fingerprint, first.label_names)
    build(batch_size=8, eval_batch_size=3, num_workers=1)  # of which neither rows nor tokens depend
    assert (len(encoded), len(read)) == (0, 0)
    build(max_length=63)
    assert (len(encoded), len(read)) == (2, 0)
    other = build(seed=1)
    assert (len(encoded), len(read)) == (2, 30)
    assert batches_of(other) != batches_of(first)
    assert len(entries()) == 2 + 2 * 3  # rows by seed, tokens of two splits by each


def test_other_content_is_read_anew(rows_of, tokenizer_folder, own_cache, monkeypatch, write):
    encoded = calls_of(monkeypatch, TextClassificationData, "encode")
    path = rows_of(TextClassificationData)
    TextClassificationData(path, tokenizer=tokenizer_folder).setup("fit")
    before = Path(path).stat()
    text = Path(path).read_text()
    Path(path).write_text(text.replace('"id3 ', '"id9 '))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither size nor time tell
    assert Path(path).stat().st_size == before.st_size
    encoded.clear()
    TextClassificationData(path, tokenizer=tokenizer_folder).setup("fit")
    assert len(encoded) == 2


@pytest.mark.parametrize("cache", [True, False])
def test_private_rows_leave_nothing_in_the_cache(rows_of, tokenizer_folder, own_cache, tmp_path, monkeypatch, cache):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    data = TextClassificationData(rows_of(TextClassificationData), tokenizer=tokenizer_folder, cache=cache)
    data.setup("fit")
    assert len(batches_of(data)) == 1
    assert bool([*own_cache.rglob("*")] if own_cache.exists() else []) == cache
    assert bool([*(tmp_path / "temporary").iterdir()]) != cache
    del data
    gc.collect()  # Lightning's objects refer to each other
    assert not [*(tmp_path / "temporary").iterdir()]


# Hyperparameters.


@pytest.mark.parametrize("kind", ["path", "frame", "dicts"])
def test_checkpoints_load_with_weights_only_whatever_the_source(write, tokenizer_folder, tmp_path, kind):
    import pandas as pd

    records = [{"text": text, "label": label} for text, label in labelled(30)]
    path = write("a.csv", labelled(30))
    train = {"path": path, "frame": pd.DataFrame(records), "dicts": records}[kind]
    data = TextClassificationData(train, tokenizer=tokenizer_folder, max_length=64, where=["label != 'maybe'"])
    runner = trainer(max_epochs=1)
    runner.fit(Model(tokenizer_folder), data)
    runner.save_checkpoint(tmp_path / "run.ckpt")
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert (kept["max_length"], kept["where"]) == (64, ["label != 'maybe'"])
    assert kept.get("train") == (path if kind == "path" else None)
    json.dumps(kept)


def test_settings_that_read_rows_otherwise_never_find_those_of_others(write, tokenizer_folder, own_cache, monkeypatch):
    """One file, one cache: each way of reading it gives what it gives in a cache of its own."""
    texts = write("texts.jsonl", [(f"id{n}", f"{n % 3}|{n % 2}.5") for n in range(12)])
    tags = write("tags.jsonl", [(["w1", f"w{n}"], [0, n % 2]) for n in range(12)], ("tokens", "tags"))
    several = {"problem": "multi_label", **ALL_TRAINED}
    ways = [
        (TextClassificationData, texts, {**several, "label_separator": "|"}),
        (TextClassificationData, texts, {**several, "label_separator": "."}),
        (TokenClassificationData, tags, {"tag_names": ["O", "B"], **ALL_TRAINED}),
        (TokenClassificationData, tags, {"tag_names": ["B", "O"], **ALL_TRAINED}),
    ]

    def read(module, path, settings):
        data = module(path, tokenizer=tokenizer_folder, **settings)
        data.setup("fit")
        return [(example.text, example.label) for example in data.examples("train")]

    shared = [read(*way) for way in ways]
    assert len({str(one) for one in shared}) == 4
    for number, way in enumerate(ways):
        monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(own_cache / f"alone{number}"))
        assert read(*way) == shared[number]


def test_rows_read_under_a_model_with_names_do_not_excuse_a_run_without(write, tokenizer_folder, own_cache):
    path = write("tags.jsonl", [(["w1", f"w{n}"], [0, n % 2]) for n in range(30)], ("tokens", "tags"))
    named = TokenClassificationData(path, tokenizer=tokenizer_folder)
    trainer(max_epochs=1).validate(Model(tokenizer_folder, ["0", "1"]), named, verbose=False)
    with pytest.raises(DataError, match="numbers for tags"):
        TokenClassificationData(path, tokenizer=tokenizer_folder).setup("fit")
