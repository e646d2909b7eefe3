import json

import pytest
import transformers

from lora_lightning.data import Seq2SeqData
from lora_lightning.errors import ConfigError, DataError
from tests.tasks.texts import save_t5

COLUMNS = ("source", "target")


def pairs(count, start=0):
    return [(f"text number {index} {'!' * (index % 5)}", f"n {index}") for index in range(start, start + count)]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def build(write, t5):
    def _build(rows=None, name="train.jsonl", stage=None, columns=COLUMNS, **settings):
        path = write(name, pairs(60) if rows is None else rows, columns)
        data = Seq2SeqData(path, **{"tokenizer": t5, "batch_size": 8, **settings})
        data.setup(stage)
        return data

    return _build


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_pairs_are_read_divided_and_counted(build, name):
    data = build([*pairs(60), *pairs(3), ("text number 0 ", "other")], name)
    every = [(source, target) for split in ("train", "val", "test") for source, target in data._rows(split)]
    assert sorted(every) == sorted([*pairs(60), ("text number 0 ", "other")])
    assert (data.counts["rows_read"], data.counts["duplicates_dropped"]) == (64, 3)
    own = {split: [source.strip() for source, _ in data._rows(split)] for split in ("train", "val", "test")}
    sides = [split for split, sources in own.items() for source in sources if source == "text number 0"]
    assert len(sides) == 2
    assert len(set(sides)) == 1


def test_files_of_either_kind_give_one_fingerprint(build):
    assert build(name="train.csv").fingerprint == build().fingerprint
    assert build(pairs(60)[::-1]).fingerprint != build().fingerprint


def test_batches_hold_prefixed_sources_and_ended_targets(build):
    data = build([("abc", "x yz"), ("a", "xy")], prefix="do: ", val_size=0, test_size=0, group_by_length=False)
    (batch,) = data.train_dataloader()
    order = batch["attention_mask"].sum(-1).argsort(descending=True)
    ids, labels = batch["input_ids"][order], batch["labels"][order]
    tokenizer = data.tokenizer
    assert [tokenizer.decode(row) for row in ids] == ["do: abc</s>", "do: a</s><pad><pad>"]
    assert [tokenizer.decode(row[row != -100]) for row in labels] == ["x yz</s>", "xy</s>"]
    assert (labels == -100).tolist() == [[False] * 5, [False] * 3 + [True] * 2]
    assert (batch["attention_mask"] == 0).tolist() == (batch["input_ids"] == tokenizer.pad_token_id).tolist()


def test_targets_end_where_the_tokenizer_has_no_frame(build, tokenizer_without_pad):
    rows = [(f"w{index}", f"w{index} w{index + 1}") for index in range(20)]
    data = build(rows, tokenizer=tokenizer_without_pad, val_size=0, test_size=0, max_target_length=3)
    labels = next(iter(data.train_dataloader()))["labels"]
    assert (labels[:, -1] == data.tokenizer.eos_token_id).all()
    assert labels.shape == (8, 3)


def test_what_is_cut_is_counted_and_told(build):
    rows = [("a" * index, "b" * (index // 2 + 1)) for index in range(1, 21)]
    whole = {"val_size": 0, "test_size": 0}
    with pytest.warns(
        UserWarning,
        match=r"9 of 20 train pairs of .* \(9 sources, 7 targets\) are longer than 12 \(source\) or 8 \(target\)",
    ):
        data = build(rows, max_length=12, max_target_length=8, **whole)
    assert (data.counts["sources_cut"], data.counts["targets_cut"]) == (9, 7)
    rows = list(data._encoded["train"])
    assert max(len(row["labels"]) for row in rows) == 8
    assert max(len(row["input_ids"]) for row in rows) == 12
    assert all(row["input_ids"][-1] == row["labels"][-1] == 1 for row in rows)


def test_texts_to_predict_need_no_targets(build, write):
    data = build(predict=write("new.jsonl", [("what",), ("",)], ("source",)))
    (batch,) = data.predict_dataloader()
    assert "labels" not in batch
    assert data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["what", ""]
    assert "labels" not in next(iter(build().predict_dataloader()))


def test_hub_data_sets_are_read(monkeypatch, t5):
    import datasets

    columns = dict(zip(("article", "highlights"), zip(*pairs(30), strict=True), strict=True))
    split = datasets.Dataset.from_dict(columns)
    splits = datasets.DatasetDict({"train": split, "test": datasets.Dataset.from_dict({**columns}).select([])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    data = Seq2SeqData("owner/news", source_column="article", target_column="highlights", tokenizer=t5, test_size=0)
    data.prepare_data()
    data.setup("fit")
    assert data.counts["rows_read"] == 30
    with pytest.raises(DataError, match="There are no rows to test: test_size is 0"):
        data.setup("test")


@pytest.mark.parametrize(
    ("columns", "rows", "settings", "message"),
    [
        (("source", "targt"), pairs(5), {}, r"no column 'target', which target_column names.*'targt'\?"),
        (("texts", "target"), pairs(5), {"source_column": "text"}, r"no column 'text'.*Did you mean 'texts'\?"),
        (COLUMNS, [("a", "b"), ("c", " ")], {}, r"jsonl, line 2: the column 'target' holds ' '; expected a text"),
        (
            COLUMNS,
            [("", "b"), ("c", "d")],
            {},
            r"jsonl, line 1: the column 'source' holds ''; expected a text.*where: \[\"source",
        ),
        (COLUMNS, [("a", ["b"])], {}, r"the column 'target' holds \['b'\]; expected a text"),
        (COLUMNS, pairs(5), {"where": ["target == 'x'"]}, "none of the 5 rows can be used: no row meets target == 'x'"),
    ],
)
def test_mistakes_in_files_are_sentences(build, columns, rows, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        build(rows, columns=columns, **settings)
    assert "\n" not in str(caught.value)


def test_conditions_leave_rows_without_a_target_out(build):
    data = build([*pairs(20), ("more", ""), ("again", " ")], where=["target != ''"])
    assert (data.counts["rows_filtered"], data.counts["rows_read"]) == (2, 22)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_target_length": 1}, "max_target_length is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"test_size": 1.5}, r"test_size is 1\.5"),
    ],
)
def test_settings_out_of_range_are_sentences(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_the_models_positions_bound_the_length(build, tmp_path, t5):
    save_t5(tmp_path)
    transformers.BartConfig(max_position_embeddings=64).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"max_length is 512, but .* takes at most 64 tokens"):
        build(tokenizer=str(tmp_path))
    assert build(tokenizer=str(tmp_path), max_length=64, max_target_length=20).counts["sources_cut"] == 0
    long = [(f"{index} " + "a" * 600, "b") for index in range(20)]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bart"
    assert build(long, max_length=700).counts["sources_cut"] == 0  # T5 has no such bound
