import pytest
import torch

from lora_lightning.data import MultipleChoiceData
from lora_lightning.errors import ConfigError, DataError

COLUMNS = ("question", "choices", "label")


ALL_TRAINED = {"val_size": 0, "test_size": 0}


def questions(count):
    return [(f"id{n} w{n % 7}", [f"w{n % 9}", f"w{n % 5} w1", "w2"][: 2 + n % 2], n % 2) for n in range(count)]


@pytest.fixture
def build(write, tokenizer_folder):
    def _build(rows=None, columns=COLUMNS, stage=None, **settings):
        path = write("train.jsonl", questions(60) if rows is None else rows, columns)
        data = MultipleChoiceData(path, **{"tokenizer": tokenizer_folder, "batch_size": 4, **settings})
        data.setup(stage)
        return data

    return _build


@pytest.fixture
def build_csv(tmp_path, tokenizer_folder):
    def _build(content, **settings):
        (tmp_path / "train.csv").write_text(content)
        data = MultipleChoiceData(str(tmp_path / "train.csv"), tokenizer=tokenizer_folder, **ALL_TRAINED, **settings)
        data.setup("fit")
        return data

    return _build


def test_questions_are_divided_and_batched(build):
    data = build()
    assert [data.counts[split] for split in ("train", "val", "test")] == [48, 6, 6]
    seen = []
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[:2] == batch["choice_mask"].shape
        assert (batch["labels"] < batch["choice_mask"].sum(-1)).all()
        seen += zip(batch["input_ids"], batch["choice_mask"], batch["labels"].tolist(), strict=True)
    rows = {row[0].split()[0]: row for row in data._rows("train")}
    assert len(seen) == len(rows) == 48
    for ids, mask, label in seen:
        texts = [data.tokenizer.decode(choice, skip_special_tokens=True) for choice in ids[mask == 1]]
        question, choices, index = rows[texts[0].split()[0]]
        assert [text.removeprefix(question).strip() for text in texts] == choices
        assert label == index


@pytest.mark.parametrize(
    ("label", "place"), [(1, 1), (1.0, 1), ("1", 1), ("B", 1), ("b", 1), ("w9", 1), ("w8", 0), ("A", 0)]
)
def test_labels_are_places_letters_or_texts(build, label, place):
    data = build([("w1", ["w8", "w9"], label)], val_size=0, test_size=0)
    assert list(data._rows("train")) == [["w1", ["w8", "w9"], place]]


def test_choices_of_hub_data_sets_are_taken_out_of_their_field(build):
    rows = [("w1", {"text": ["w8", "w9"], "label": ["A", "B"]}, "B")]
    assert list(build(rows, val_size=0, test_size=0)._rows("train")) == [["w1", ["w8", "w9"], 1]]


@pytest.mark.parametrize(
    ("names", "label", "place"), [(["1", "2"], "1", 0), (["B", "A"], "A", 1), ([1, 2], 2, 1), (["x", "y"], 1, 1)]
)
def test_labels_are_the_names_that_a_row_gives_its_choices(build, names, label, place):
    field = {"text": ["w8", "w9"], "label": names}
    assert list(build([("w1", field, label)], **ALL_TRAINED)._rows("train")) == [["w1", ["w8", "w9"], place]]
    with pytest.raises(DataError, match="2 choices have 1 labels"):
        build([("w1", {**field, "label": names[:1]}, label)], **ALL_TRAINED)


def test_choices_of_csv_files(build_csv):
    """As lists written as text, and each in a column of its own."""
    listed = 'question,choices,label\nw1,"[\'w8\', \'w9\']",1\nw2,"[""w8"", ""w9""]",A\n'
    expected = [["w1", ["w8", "w9"], 1], ["w2", ["w8", "w9"], 0]]
    assert list(build_csv(listed)._rows("train")) == expected
    apart = "question,a,b,c,label\nw1,w8,w9,,b\nw2,w8,w9,w7,2\n"
    found = build_csv(apart, choices_column=["a", "b", "c"])
    assert list(found._rows("train")) == [expected[0], ["w2", ["w8", "w9", "w7"], 2]]
    for cell in ("w8|w9", "\"['w8' 'w9']\""):
        with pytest.raises(DataError, match=r"line 2: the column 'choices' holds .* a list of at least two choices"):
            build_csv(f"question,choices,label\nw1,{cell},1\n")
    with pytest.raises(DataError, match=r"line 2: the column 'a' holds .* a choice in at least two of the columns"):
        build_csv("question,a,b,label\nw1,w8,,0\n", choices_column=["a", "b"])


def test_numbers_that_never_are_0_are_warned_of(build):
    rows = [(f"id{n}", ["w8", "w9", "w7"], n % 2 + 1) for n in range(40)]
    with pytest.warns(UserWarning, match=r"label is never 0 in 40 rows, .* subtract 1"):
        build(rows)
    build([(*row[:2], row[2] - 1) for row in rows])  # control: warnings are errors
    build([(*row[:2], row[1][row[2]]) for row in rows])
    with pytest.raises(DataError, match=r"holds 3; there are 3 choices; .* If the labels count from 1, subtract 1"):
        build([(*row[:2], row[2] + 1) for row in rows])


def test_choices_that_leave_no_room_for_their_question(build):
    rows = [("w1 w2", ["w3 " * 6, "w4"], 0), ("w1", ["w3", "w4"], 1)]
    frame = build(rows, **ALL_TRAINED).tokenizer.num_special_tokens_to_add(pair=True)
    for length in (6, 6 + frame):
        with pytest.raises(DataError, match=rf"line 1: a choice has 6 tokens, .* within {length}\. Set a larger"):
            build(rows, max_length=length, **ALL_TRAINED)
    with pytest.warns(UserWarning, match=r"1 of 2 train questions .* were left out"):
        data = build(rows, max_length=6 + frame, too_long="drop", **ALL_TRAINED)
    assert [one.text for one in data.examples("train")] == ["w1"]
    with pytest.warns(UserWarning, match=r"1 of 2 train questions .* were cut"):  # control: room for one token
        assert len(list(build(rows, max_length=7 + frame, **ALL_TRAINED).examples("train"))) == 2


def test_questions_to_predict_need_no_labels(build, write):
    data = build(predict=write("new.jsonl", [row[:2] for row in questions(3)], COLUMNS[:2]))
    (batch,) = data.predict_dataloader()
    assert "labels" not in batch
    assert batch["choice_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert torch.equal(batch["input_ids"][0, 2], batch["input_ids"][0, 0])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [("w1", ["w8", "w9"], 2)],
            COLUMNS,
            r"line 1: the column 'label' holds 2; there are 2 choices; .* \(A to B\)",
        ),
        ([("w1", ["w8", "w9"], "C")], COLUMNS, "holds 'C'"),
        ([("w1", ["w8", "w9"], "no")], COLUMNS, "holds 'no'"),
        ([("w1", ["w8", "w9"], None)], COLUMNS, "holds None"),
        ([("w1", ["w8"], 0)], COLUMNS, "line 1: the column 'choices' holds .* a list of at least two choices"),
        ([("w1", "w8", 0)], COLUMNS, "a list of at least two choices"),
        ([("w1", ["w8", "w9"], 0)], ("question", "choice", "label"), r"no column 'choices'.*Did you mean 'choice'\?"),
    ],
)
def test_mistakes_in_files_are_sentences(build, rows, columns, message):
    with pytest.raises(DataError, match=message):
        build(rows, columns)


def test_settings_out_of_range_are_sentences(build):
    with pytest.raises(ConfigError, match="max_length is 3"):
        build(max_length=3)
