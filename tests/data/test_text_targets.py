"""Texts with several labels, and with numbers, from their sources to batches."""

import pytest
import torch

from lora_lightning.data import TextClassificationData
from lora_lightning.errors import ConfigError, DataError
from tests.data.toys import Model, trainer

ALL_TRAINED = {"val_size": 0, "test_size": 0, "group_by_length": False}
LABELS = [["spam"], ["toxic", "rude"], [], ["rude"], ["rude", "spam"], ["toxic"]]
NAMES = ["rude", "spam", "toxic"]
SCORES = [0.5, 2.0, -1.25, 3.0, 1e-3, 7.0]


class ProblemModel(Model):
    """A model with a problem, as `SequenceClassification` has one."""

    def __init__(self, backbone, problem, label_names=None):
        super().__init__(backbone, label_names)
        self.problem = problem


def texts(count=6):
    return [f"id{n} w{n}" for n in range(count)]


@pytest.fixture
def build(write, tokenizer_folder):
    def _build(name, rows, columns=("text", "label"), stage="fit", **settings):
        path = write(name, rows, columns)
        data = TextClassificationData(path, tokenizer=tokenizer_folder, batch_size=64, **{**ALL_TRAINED, **settings})
        data.setup(stage)
        return data

    return _build


def labels_by_text(data):
    """What stands in the batches, by the text."""
    (batch,) = data.train_dataloader()
    special = set(data.tokenizer.all_special_ids) | set(
        data.tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]"])
    )
    words = [data.tokenizer.decode([one for one in ids if one not in special]) for ids in batch["input_ids"].tolist()]
    return batch["labels"], dict(zip(words, batch["labels"].tolist(), strict=True))


# Several labels.


@pytest.mark.parametrize("form", ["lists", "separated", "other separator", "columns"])
def test_several_labels_of_any_form_are_one_matrix(build, form):
    settings = {"problem": "multi_label"}
    rows = list(zip(texts(), LABELS, strict=True))
    if form == "lists":
        data = build("a.jsonl", rows, **settings)
    elif form == "separated":
        data = build("a.csv", [(text, "; ".join(labels)) for text, labels in rows], **settings)
    elif form == "other separator":
        data = build("a.csv", [(text, "/".join(labels)) for text, labels in rows], label_separator="/", **settings)
    else:
        flags = [(text, *(int(name in labels) for name in NAMES)) for text, labels in rows]
        data = build("a.csv", flags, ("text", *NAMES), label_column=NAMES, **settings)
    labels, found = labels_by_text(data)
    assert data.label_names == NAMES
    assert labels.dtype == torch.float32
    assert labels.shape == (6, 3)
    assert found == {text: [float(name in labels) for name in NAMES] for text, labels in rows}
    assert data.label_counts == {"rude": 3, "spam": 2, "toxic": 2}
    assert [one.label for one in data.examples("train")][:3] == [("spam",), tuple(_in_order(form, 1)), ()]


def _in_order(form, row):
    return [name for name in NAMES if name in LABELS[row]] if form == "columns" else LABELS[row]


def test_columns_name_the_labels_in_their_order(build):
    rows = [(text, n % 2, 1) for n, text in enumerate(texts())]
    data = build("a.csv", rows, ("text", "zeal", "anger"), label_column=["zeal", "anger"], problem="multi_label")
    assert data.label_names == ["zeal", "anger"]
    assert labels_by_text(data)[1] == {text: [float(n % 2), 1.0] for n, text in enumerate(texts())}


def test_names_that_are_given_settle_the_order_of_several_labels(build):
    rows = list(zip(texts(), LABELS, strict=True))
    names = ["toxic", "unseen", "spam", "rude"]
    data = build("a.jsonl", rows, problem="multi_label", label_names=names)
    assert data.label_names == names
    assert labels_by_text(data)[1] == {text: [float(name in labels) for name in names] for text, labels in rows}
    with pytest.raises(DataError, match=r"that label_names does not have: 'toxic' \(\S+, line 2\); known are 'spam'"):
        build("a.jsonl", rows, problem="multi_label", label_names=["spam", "rude"])


def test_copies_of_texts_with_several_labels_stay_in_one_split(build):
    many = [f"id{n}" for n in range(40)]
    rows = [
        *((text, ["a"]) for text in many),
        *((text, ["a", "b"]) for text in many),
        *((text, ["a"]) for text in many),
    ]
    data = build("a.jsonl", rows, problem="multi_label", val_size=0.2, test_size=0.2, stage=None)
    assert (data.counts["duplicates_dropped"], data.counts["contradictions_dropped"]) == (40, 0)
    by_split = {split: {text for text, _ in data._rows(split)} for split in ("train", "val", "test")}
    assert sum(map(len, by_split.values())) == len(set().union(*by_split.values())) == 40
    assert all(by_split.values())


def test_separators_that_contradict_each_other_are_refused(build):
    rows = [("id1", "a;b|c"), ("id2", "a")]
    with pytest.raises(
        DataError, match=r"a\.csv, line 2: .*';' or '\|' may separate the labels. Set `label_separator`"
    ):
        build("a.csv", rows, problem="multi_label")
    assert build("a.csv", rows, problem="multi_label", label_separator=";").label_names == ["a", "b|c"]


def test_lists_of_labels_need_the_problem(build):
    with pytest.raises(
        DataError, match=r"line 1: the column 'label' holds .*; expected one label.* set `problem: multi_label`"
    ):
        build("a.jsonl", list(zip(texts(), LABELS, strict=True)))
    with pytest.raises(ConfigError, match="label_column names several columns"):
        build("a.csv", [("id1", 0, 1)], ("text", "a", "b"), label_column=["a", "b"])


# Numbers.


def test_numbers_of_one_column(build):
    data = build("a.csv", list(zip(texts(), SCORES, strict=True)), problem="regression")
    labels, found = labels_by_text(data)
    assert (labels.dtype, labels.shape) == (torch.float32, (6,))
    assert found == dict(zip(texts(), torch.tensor(SCORES).tolist(), strict=True))
    assert data.label_names == ["score"]
    assert [one.label for one in data.examples("train")] == SCORES


@pytest.mark.parametrize("order", [["good", "long"], ["long", "good"]])
def test_numbers_of_several_columns_keep_the_order_of_the_setting(build, order):
    rows = [(text, score, 10.0 + n) for n, (text, score) in enumerate(zip(texts(), SCORES, strict=True))]
    data = build("a.csv", rows, ("text", "good", "long"), label_column=order, problem="regression")
    labels, found = labels_by_text(data)
    assert (labels.dtype, labels.shape) == (torch.float32, (6, 2))
    assert data.label_names == order
    pairs = [{"good": good, "long": long} for _, good, long in rows]
    expected = torch.tensor([[pair[name] for name in order] for pair in pairs]).tolist()
    assert found == dict(zip(texts(), expected, strict=True))


def test_whole_numbers_are_numbers_too(build):
    labels, found = labels_by_text(build("a.jsonl", [("id1", 1), ("id2", 2), ("id3", "3")], problem="regression"))
    assert labels.dtype == torch.float32
    assert found == {"id1": 1.0, "id2": 2.0, "id3": 3.0}


def test_rows_without_a_number_are_left_out_and_others_refused(build):
    data = build("a.csv", [("id1", 1.5), ("id2", ""), ("id3", 2)], problem="regression")
    assert (data.counts["rows_incomplete"], data.counts["train"]) == (1, 2)
    with pytest.raises(
        DataError, match=r"a\.csv, line 3: the column 'label' holds 'good'; `problem: regression` needs a finite number"
    ):
        build("a.csv", [("id1", 1.5), ("id2", "good")], problem="regression")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_scores_are_no_classes_unless_they_are_named(build, name):
    rows = [(f"id{n}", n % 4 / 2) for n in range(40)]
    with pytest.raises(DataError, match=r"the labels look like scores.*`problem: regression`.*`label_names`") as caught:
        build(name, rows)
    assert "\n" not in str(caught.value)
    assert build(name, rows, problem="regression").label_names == ["score"]
    halves = [(text, score + 0.5) for text, score in rows if score % 1 == 0]
    assert build(name, halves, label_names=["0.5", "1.5"]).label_names == ["0.5", "1.5"]
    assert build(name, [(text, int(score)) for text, score in rows]).label_names == ["0", "1"]


def test_names_that_are_given_settle_what_a_class_is(build):
    joined = [(f"id{n}", ("a", "b", "a;b")[n % 3]) for n in range(30)]
    titles = [(f"id{n}", f"title {n}") for n in range(150)]
    with pytest.warns(UserWarning, match=r"labels such as 'a;b' look like several labels in one"):
        build("a.csv", joined)
    assert build("a.csv", joined, label_names=["b", "a;b", "a"]).label_names == ["b", "a;b", "a"]
    with pytest.raises(
        DataError, match=r"150 rows have 150 different labels .*`label_column` probably names the wrong"
    ):
        build("a.csv", titles)
    assert len(build("a.csv", titles, label_names=[title for _, title in titles]).label_names) == 150
    numbered = build("a.csv", [(f"id{n}", n % 2) for n in range(10)], label_names=[1, 0])
    assert numbered.label_names == ["1", "0"]


@pytest.mark.parametrize(
    ("problem", "cells", "expected"),
    [
        ("single_label", [0, 1, "pos"], [0, 1, 1]),
        ("multi_label", [[0], [1], ["neg"]], [[1, 0], [0, 1], [1, 0]]),
        ("multi_label", [[0, 1], [1, 1], [0.0, 0.0]], [[0, 1], [1, 1], [0, 0]]),
        ("multi_label", ["[0, 1]", "1;1", "0,0"], [[0, 1], [1, 1], [0, 0]]),
    ],
)
def test_names_that_are_given_may_be_told_by_their_numbers(build, problem, cells, expected):
    settings = {"problem": problem, "label_names": ["neg", "pos"]}
    rows = [(f"id{n}", cell) for n, cell in enumerate(cells)]
    labels = [one.labels for one in build("a.jsonl", rows, **settings).examples("train")]
    assert [label.tolist() if hasattr(label, "tolist") else label for label in labels] == expected
    unknown = ("id9", 2 if problem == "single_label" else [2])
    with pytest.raises(DataError, match=r"label_names does not have: '2' .*known are 'neg', 'pos'"):
        build("a.jsonl", [*rows, unknown], **settings)


def test_labels_that_differ_in_case_are_warned_of(build):
    rows = [(f"id{n}", ("pos", "Pos", "neg")[n % 3]) for n in range(9)]
    for settings in ({}, {"problem": "multi_label"}):
        with pytest.warns(UserWarning, match="the labels 'pos' and 'Pos' differ in the case of their letters only"):
            build("a.csv", rows, **settings)
    build("a.csv", [(text, label.lower()) for text, label in rows])  # control: warnings are errors


# Whose problem it is.


@pytest.mark.parametrize(("own", "tasks", "expected"), [(None, "multi_label", "multi_label"),
                                                       (None, "regression", "regression"),
                                                       ("single_label", "multi_label", "single_label"),
                                                       (None, None, "single_label")])  # fmt: skip
def test_the_tasks_problem_is_taken_where_the_data_names_none(write, tokenizer_folder, own, tasks, expected):
    path = write("a.csv", [(f"id{n}", n % 2) for n in range(20)])
    data = TextClassificationData(path, problem=own, tokenizer=tokenizer_folder)
    model = ProblemModel(tokenizer_folder, tasks) if tasks else Model(tokenizer_folder)
    trainer(max_epochs=1).validate(model, data, verbose=False)
    assert data.problem == expected
    (batch,) = data.val_dataloader()
    kinds = {
        "single_label": (torch.int64, (2,)),
        "multi_label": (torch.float32, (2, 2)),
        "regression": (torch.float32, (2,)),
    }
    assert (batch["labels"].dtype, batch["labels"].shape) == kinds[expected]


def test_unknown_problems_are_refused():
    with pytest.raises(ConfigError, match="problem is 'ranking': expected single_label, multi_label, regression"):
        TextClassificationData("a.csv", problem="ranking")


# Copies against imbalance.


def test_copies_are_kept_in_one_split_when_asked_for(build):
    rare = [("id0 rare", "yes")] * 10 + [("id1 rare", "yes")] * 10 + [("id2 rare", "yes")] * 10
    rows = [*((f"id{n}", "no") for n in range(3, 33)), *rare]
    sizes = {"val_size": 3, "test_size": 3, "stage": None}
    kept = build("a.csv", rows, duplicates="keep", **sizes)
    every = [(text, label) for split in ("train", "val", "test") for text, label in kept._rows(split)]
    assert sorted(every) == sorted(rows)
    by_split = [{text for text, _ in kept._rows(split)} for split in ("train", "val", "test")]
    assert sum(map(len, by_split)) == len(set().union(*by_split))
    assert kept.counts["duplicates_dropped"] == 0
    assert kept.label_counts["yes"] == 10
    dropped = build("a.csv", rows, **sizes)  # control
    assert dropped.counts["duplicates_dropped"] == 27
    assert dropped.label_counts["yes"] == 1
    with pytest.raises(ConfigError, match="duplicates is 'all': expected drop or keep"):
        TextClassificationData("a.csv", duplicates="all")
