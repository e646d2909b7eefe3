"""Labelled texts from their sources to divided rows with labels."""

import logging
from collections import Counter
from unittest.mock import Mock

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from lora_lightning.data import TextClassificationData
from lora_lightning.errors import ConfigError, DataError
from tests.data.conftest import labelled
from tests.data.toys import Model, pairs_of, texts_of, trainer

SPLITS = ("train", "val", "test", "predict")


# Reading and dividing.


def test_rows_are_divided_counted_and_told(build_texts, caplog):
    rows = [*labelled(100), *labelled(5), ("twice", "no"), ("twice", "yes"), ("", "no"), ("no label", "")]
    # Lightning's loggers do not hand on to the root, where caplog listens.
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        data = build_texts(rows)
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    assert data.counts == {
        "rows_read": 109,
        "rows_filtered": 0,
        "rows_incomplete": 2,
        "rows_bad": 0,
        "duplicates_dropped": 5,
        "contradictions_dropped": 2,
        "train": 80,
        "val": 10,
        "test": 10,
        "unused": 0,
        "leaked": 0,
    }
    assert {split: len(pairs_of(data, split)) for split in SPLITS} == {
        "train": 80,
        "val": 10,
        "test": 10,
        "predict": 10,
    }
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Data: 109 rows read")]
    assert set(told) == {
        "Data: 109 rows read, 0 filtered out by where, 2 without a text and a label, 0 broken and skipped, 5 "
        "duplicates and 2 rows with contradictory labels dropped; 80 train, 10 val, 10 test, 0 not used."
    }
    assert data.label_names == ["no", "yes"]
    order = [text for text, _ in labelled(100)]
    for split in SPLITS:
        texts = [text for text, _ in pairs_of(data, split)]
        assert texts == sorted(texts, key=order.index)
    own = [pair for split in ("train", "val", "test") for pair in pairs_of(data, split)]
    assert sorted(own) == sorted(labelled(100))


def test_conditions_and_sizes_leave_rows_unused(write, tokenizer_folder):
    rows = [(text, label, index % 2) for index, (text, label) in enumerate(labelled(200, "abc"))]
    path = write("train.jsonl", rows, ("tweet", "mood", "sure"))
    data = TextClassificationData(
        path,
        text_column="tweet",
        label_column="mood",
        where=["sure == 1"],
        train_size=50,
        val_size=0.2,
        test_size=9,
        tokenizer=tokenizer_folder,
    )
    data.setup()
    assert (data.counts["rows_filtered"], data.counts["unused"]) == (100, 21)
    assert [data.counts[split] for split in ("train", "val", "test")] == [50, 20, 9]
    sure = {text for text, _, yes in rows if yes}
    assert all(text in sure for split in SPLITS for text, _ in pairs_of(data, split))
    assert Counter(label for _, label in pairs_of(data, "test")) == {"a": 3, "b": 3, "c": 3}


def test_sources_of_their_own_keep_their_rows_and_leaks_are_warned_of(write, tokenizer_folder):
    train, val = (
        write("train.csv", labelled(40)),
        write("val.csv", [*labelled(3), *labelled(2, start=50), *labelled(1)]),
    )
    test = write("test.jsonl", labelled(6, start=60))
    data = TextClassificationData(train, val=val, test=test, tokenizer=tokenizer_folder)
    with pytest.warns(UserWarning, match=r"4 of 6 rows of .*val\.csv have a text that is trained on too") as caught:
        data.setup()
    assert len(caught) == 1  # nothing of the test file, which shares no text
    assert data.counts["leaked"] == 4
    assert [data.counts[split] for split in ("train", "val", "test")] == [40, 6, 6]
    assert data.counts["rows_read"] == 52


def test_labels_unseen_in_training_are_named(write, build_texts):
    other = write("other.csv", [*labelled(3, start=200), ("new", "maybe"), ("newer", "perhaps")])
    with pytest.raises(
        DataError,
        match=r"other\.csv has labels among its test rows that the training rows do not have: "
        r"'maybe' \(\S+other\.csv, line 5\), 'perhaps' \(\S+, line 6\); known are 'no', 'yes'",
    ):
        build_texts(test=other)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([("a", "x"), ("b", "x")], {}, "has only the label 'x' .*Check label_column"),
        ([("a", "x"), ("a", "y")], {}, "has no row left .*Check label_column"),
        ([("a", "x"), ("a", "y"), *labelled(30, "x")], {}, "has only the label 'x' .*Check label_column"),
        (
            [("a", "x"), ("b", "y")],
            {"text_column": "txt"},
            "no column 'txt', which text_column names.*Did you mean 'text'",
        ),
        ([("a", "x"), ("b", "y")], {"label_column": "lable"}, "no column 'lable'.*Did you mean 'label'"),
        ([*labelled(30, "x"), ("b", "y")], {}, r"Too rare to be split into train, val, test, .*: 'y' \(1\)"),
        (None, {"test_size": 0.999}, r"ask for 110 rows"),
        (None, {"train_size": 99}, r"ask for 119 rows"),
        (None, {"where": ["label == 'x'"]}, "no row meets label == 'x'"),
        ([], {}, "holds no rows"),
    ],
)
def test_data_that_cannot_be_used(build_texts, rows, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        build_texts(rows, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: expected a whole number of at least 1"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"seed": -1}, "seed is -1: expected a whole number of at least 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"val_size": 1.5}, "val_size is 1.5"),
        ({"val_size": 10, "val": "val.csv"}, "val_size is 10, but val names rows of its own"),
        ({"where": ["confidence"]}, "'confidence' in where cannot be read"),
    ],
)
def test_settings_are_checked_before_anything_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        TextClassificationData("there/is/no/such.csv", **settings)


# Labels and the model.


def test_labels_take_the_order_that_the_model_has(build_texts, tokenizer_folder):
    data = build_texts()
    assert data.label_names == ["no", "yes"]
    own = data.fingerprint
    rows = dict(pairs_of(data, "val"))
    for names in (["yes", "no"], ["maybe", "yes", "no"], None):
        model = Model(tokenizer_folder, names)
        trainer(max_epochs=1).validate(model, data, verbose=False)
        assert data.label_names == (names or ["no", "yes"])
        batches = data.val_dataloader()
        labels = [data.label_names[index] for batch in batches for index in batch["labels"].tolist()]
        assert [rows[text] for text in texts_of(data, batches)] == labels
        assert (data.fingerprint == own) == (names is None)


def test_labels_that_the_model_does_not_know_are_named(build_texts, tokenizer_folder):
    data = build_texts()
    with pytest.raises(
        DataError,
        match=r"labels among its train rows that the model does not have: 'no' \(\S+, line 2\); known are 'yes', 'ja'",
    ):
        trainer().test(Model(tokenizer_folder, ["yes", "ja"]), data, verbose=False)


# Setup.


def test_setup_does_nothing_twice(build_texts, monkeypatch):
    data = build_texts(stage="fit")
    assert set(data._encoded) == {"train", "val"}
    encoded = dict(data._encoded)
    data.setup("test")
    assert set(data._encoded) == {"train", "val", "test"}
    monkeypatch.setattr(data, "_read", Mock(side_effect=AssertionError("read again")))
    monkeypatch.setattr(data, "_encode", Mock(side_effect=AssertionError("tokenized again")))
    data.setup("fit")
    data.setup("test")
    assert all(data._encoded[split] is those for split, those in encoded.items())
    with pytest.raises(AssertionError, match="tokenized again"):  # control
        data.setup("predict")
    data.counts = {}
    with pytest.raises(AssertionError, match="read again"):  # control
        data.setup("fit")


def test_fingerprint_follows_rows_split_and_labels(build_texts):
    own = build_texts().fingerprint
    assert len(own) == 64
    with pytest.warns(UserWarning, match="were cut at it"):
        assert build_texts(batch_size=3, max_length=5).fingerprint == own
    assert build_texts(seed=1).fingerprint != own
    assert build_texts(labelled(101)).fingerprint != own


def test_stages_without_rows(build_texts):
    data = build_texts(val_size=0, test_size=0, stage="fit")
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []
    assert data.counts["train"] == 100
    of_trainer = [TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING]
    for stage, name in {"validate": "val", "test": "test", "predict": "test"}.items():
        with pytest.raises(DataError, match=f"no rows to {stage}: {name}_size is 0"):
            data.setup(stage)
    for stage, name in zip(of_trainer, ["val", "test", "test"], strict=True):
        with pytest.raises(DataError, match=f"no rows to {stage.value}: {name}_size is 0"):
            data.setup(stage)


def test_loaders_before_setup_say_what_to_do():
    with pytest.raises(ConfigError, match="The train rows are not there: call setup"):
        TextClassificationData("x.csv").train_dataloader()


def test_hub_data_sets_are_fetched_once_before_setup(monkeypatch, tokenizer_folder, write):
    import datasets

    asked = []

    def load(*names):
        asked.append(names)
        texts, labels = zip(*labelled(40), strict=True)
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)}))

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = TextClassificationData(
        "owner/reviews", test=write("test.csv", labelled(4, start=90)), tokenizer=tokenizer_folder
    )
    data.prepare_data()
    assert asked == [("owner/reviews", None)]
    data.setup()
    assert data.counts["train"] == 36
