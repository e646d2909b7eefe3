"""`val` as a mapping of names to sources, in every data module."""

import json
import warnings
from unittest.mock import Mock

import pandas
import pytest

from lora_lightning.data import InstructionData, MultipleChoiceData, Seq2SeqData, TextClassificationData
from lora_lightning.data.rows.named_sets import split_sources
from lora_lightning.errors import ConfigError, DataError
from tests.data.conftest import labelled
from tests.data.talk import llama_config, save_tokenizer, write_lines

SIZES = {"train": 40, "reviews": 6, "tweets": 9}


@pytest.fixture
def paths(write):
    """Files of different texts, by name."""
    starts = dict(zip(SIZES, (0, 100, 200), strict=True))
    return {name: write(f"{name}.csv", labelled(count, start=starts[name])) for name, count in SIZES.items()}


@pytest.fixture
def build(paths, tokenizer_folder):
    def _build(val=None, stage="fit", **settings):
        val = {name: paths[name] for name in ("reviews", "tweets")} if val is None else val
        usual = {"tokenizer": tokenizer_folder, "test_size": 0, "batch_size": 4}
        data = TextClassificationData(paths["train"], val=val, **{**usual, **settings})
        data.setup(stage)
        return data

    return _build


def first_words(loader):
    return sorted(word for batch in loader for word in batch["input_ids"][:, 1].tolist())


def test_each_name_is_a_split_of_its_own(build, paths):
    data = build()
    loaders = data.val_dataloader()
    assert list(loaders) == ["reviews", "tweets"]
    for name, loader in loaders.items():
        alone = build(paths[name])
        assert first_words(loader) == first_words(alone.val_dataloader())
        assert [one.text for one in data.examples(f"val/{name}")] == [one.text for one in alone.examples("val")]
        assert len(loader.dataset) == SIZES[name]
    assert first_words(loaders["reviews"]) != first_words(loaders["tweets"])
    everything = [one.text for name in loaders for one in data.examples(f"val/{name}")]
    assert [one.text for one in data.examples("val")] == everything
    counted = {name: data.counts[name] for name in ("rows_read", "train", "val", "val/reviews", "val/tweets")}
    assert counted == {"rows_read": 55, "train": 40, "val": 15, "val/reviews": 6, "val/tweets": 9}


def test_examples_come_from_files_that_are_there(build):
    data = build()
    with pytest.raises(ConfigError, match="The val/other rows are not there"):
        next(data.examples("val/other"))
    fresh = TextClassificationData("x.csv", val={"a": "y.csv"})
    with pytest.raises(ConfigError, match="call setup"):
        next(fresh.examples("val"))
    with pytest.raises(ConfigError, match="call setup"):
        fresh.val_dataloader()


def test_leaks_are_counted_and_told_by_name(build, paths, write):
    leaky = write("leaky.csv", [*labelled(4), *labelled(3, start=300)])
    with pytest.warns(UserWarning, match=r"4 of 7 rows of .*leaky\.csv .* the figures for val/tweets will") as caught:
        data = build({"reviews": paths["reviews"], "tweets": leaky})
    assert len([one for one in caught if "trained on" in str(one.message)]) == 1
    found = {name: data.counts[name] for name in ("leaked", "val/reviews/leaked", "val/tweets/leaked")}
    assert found == {"leaked": 4, "val/reviews/leaked": 0, "val/tweets/leaked": 4}
    assert "val/leaked" not in build(paths["reviews"]).counts


def test_the_fingerprint_tells_names_and_rows_apart(build, paths):
    first = build()
    assert build().fingerprint == first.fingerprint
    renamed = {"reviews": paths["reviews"], "messages": paths["tweets"]}
    swapped = {"reviews": paths["tweets"], "tweets": paths["reviews"]}
    others = {build(val).fingerprint for val in (renamed, swapped, [paths["reviews"], paths["tweets"]])}
    assert len({first.fingerprint, *others}) == 4


def test_settings_stay_plain_and_data_in_memory_is_left_out(build, paths):
    data = build()
    assert json.loads(json.dumps(dict(data.hparams)))["val"] == {name: paths[name] for name in ("reviews", "tweets")}
    frame = pandas.DataFrame(labelled(5, start=320), columns=["text", "label"])
    rows = frame.iloc[:3].to_dict("records")
    mixed = build({"frame": frame, "rows": rows, "tweets": paths["tweets"]})
    assert "val" not in mixed.hparams
    assert [mixed.counts[f"val/{name}"] for name in ("frame", "rows", "tweets")] == [5, 3, 9]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "val is a mapping without an entry"),
        ({"": "a.csv"}, "val has a set named ''; expected a text of letters"),
        ({"a b": "a.csv"}, "val has a set named 'a b'"),
        ({"a/b": "a.csv"}, "val has a set named 'a/b'"),
        ({"a\\b": "a.csv"}, "val has a set named"),
        ({2020: "a.csv"}, "val has a set named 2020"),
        ({"loss": "a.csv"}, "val has a set named 'loss', which is the name of a metric"),
        ({"F1": "a.csv"}, "val has a set named 'F1', which is the name of a metric"),
        ({"rouge1": "a.csv"}, "the name of a metric"),
        ({"a": "a.csv", "b": None}, "val has a set 'b' without a source"),
        ({"a": "a.csv", "A": "b.csv"}, "differ in the case of their letters only"),
    ],
    ids=str,
)
def test_names_are_checked_before_anything_is_read(sources, message):
    with pytest.raises(ConfigError, match=message.replace("\\", "\\\\")):
        TextClassificationData("train.csv", val=sources)


def test_other_names_are_taken():
    names = ["reviews", "2020", "de-AT", "v1.0", "émotions", "losses"]
    assert list(split_sources({"val": dict.fromkeys(names, "a.csv")})) == [f"val/{name}" for name in names]


def test_only_val_and_predict_may_be_mappings():
    for split in ("train", "test"):
        settings = {"train": "a.csv", split: {"a": "b.csv"}}
        with pytest.raises(ConfigError, match=f"{split} is a mapping \\(a\\), which only val and predict may be"):
            TextClassificationData(**settings)


def test_a_size_contradicts_sources(paths):
    with pytest.raises(ConfigError, match="val_size is 5, but val names rows of its own"):
        TextClassificationData(paths["train"], val={"a": paths["reviews"]}, val_size=5)


def test_mistakes_name_the_set(build, paths, write):
    strange = write("strange.csv", [("text one", "maybe")])
    with pytest.raises(DataError, match=r"strange\.csv has labels among its val/odd rows"):
        build({"reviews": paths["reviews"], "odd": strange})
    with pytest.raises(DataError, match=r"nowhere\.csv does not exist"):
        build({"reviews": paths["reviews"], "odd": "nowhere.csv"})


def test_every_rank_needs_rows_of_every_set(build, paths, write):
    few = write("few.csv", labelled(1, start=310))
    data = build({"few": few, "reviews": paths["reviews"]})
    data._encoded.clear()
    data.trainer = Mock(distributed_sampler_kwargs={"num_replicas": 2, "rank": 0}, lightning_module=None)
    with pytest.raises(DataError, match="val/few has 1 rows for 2 ranks"):
        data.setup("fit")


# Other data modules.


def test_pairs_and_questions_have_sets_too(write, tokenizer_folder):
    rows = {
        Seq2SeqData: (("source", "target"), lambda name, i: (f"w{i} {name}", f"w{i}")),
        MultipleChoiceData: (("question", "choices", "label"), lambda name, i: (f"w{i} {name}", ["w1", "w2"], i % 2)),
    }
    for module, (columns, row_of) in rows.items():
        train, first, second = (
            write(f"{module.__name__}_{name}.jsonl", [row_of(name, index) for index in range(4)], columns)
            for name in ("train", "first", "second")
        )
        data = module(train, val={"first": first, "second": second}, test_size=0, tokenizer=tokenizer_folder)
        data.setup("fit")
        assert {name: len(loader.dataset) for name, loader in data.val_dataloader().items()} == {
            "first": 4,
            "second": 4,
        }
        assert next(data.examples("val/second")).text == "w0 second"


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_have_sets_beside_a_stream_too(tmp_path, streaming):
    (tmp_path / "tokenizer").mkdir()
    folder = save_tokenizer(tmp_path / "tokenizer", config=llama_config())

    def file(name, count):
        return write_lines(
            tmp_path / f"{name}.jsonl",
            [{"prompt": f"question {index} of {name} ", "completion": f"answer {index}"} for index in range(count)],
        )

    data = InstructionData(
        file("train", 20),
        val={"long": file("long", 5), "short": file("short", 3)},
        tokenizer=folder,
        batch_size=4,
        streaming=streaming,
        packing=True,
        max_length=64,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
    assert list(data.val_dataloader()) == ["long", "short"]
    assert [data.counts[name] for name in ("val", "val/long", "val/short")] == [8, 5, 3]
    assert [one.text for one in data.examples("val/short")] == [
        f"question {i} of short answer {i}<eos>" for i in range(3)
    ]
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) > 0
