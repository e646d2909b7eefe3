"""Label cells become targets, or a sentence that names the right setting."""

from __future__ import annotations

import warnings

import pytest

from lora_lightning.data.rows.cells import Cell
from lora_lightning.data.rows.targets import check_single_labels, target_of
from lora_lightning.errors import DataError

PLACE = "films.csv, row 3"


def of(cell, problem, separator=None, names=()):
    return target_of([Cell(cell, "label", PLACE)], problem, separator, names)


def of_columns(fields, columns, problem):
    return target_of([Cell(fields.get(column), column, PLACE) for column in columns], problem)


def check(counts, source="t.csv"):
    check_single_labels(counts, source, sum(counts.values()))


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (" good ", "good"),
        ("00", "00"),
        (3, "3"),
        (True, "True"),
        (2.0, "2"),
        (4.5, "4.5"),
        ("", None),
        (None, None),
        (float("nan"), None),
    ],
)
def test_a_single_label_is_a_text(cell, name):
    assert of(cell, "single_label") == name


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (["a", "b"], "expected one label.*problem: multi_label"),
        ({"a": 1}, "holds {'a': 1}; expected one label"),
        (float("inf"), "expected one label"),
        ("word " * 60, "text of 299 characters, .*`label_column` probably names the wrong column"),
    ],
)
def test_what_is_no_single_label_is_refused_with_its_place(cell, words):
    with pytest.raises(DataError, match=f"^{PLACE}: the column 'label'.*{words}"):
        of(cell, "single_label")


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        (["b", "a"], ["b", "a"]),
        ([0, True, 2.0], ["0", "True", "2"]),
        ([], []),
        ("", []),
        (None, None),
        (float("nan"), None),
        (7, ["7"]),
        ("a; b ;a;", ["a", "b"]),
        ("a|b", ["a", "b"]),
        ("a, b", ["a", "b"]),
        ("alone", ["alone"]),
        ('["a", "b c"]', ["a", "b c"]),
        ("['a', 'b']", ["a", "b"]),
        ("['a','b']", ["a", "b"]),
        ("['']", []),
        ("[]", []),
    ],
)
def test_several_labels_come_from_lists_and_separated_texts(cell, labels):
    assert of(cell, "multi_label") == labels


def test_a_list_of_flags_names_the_classes_that_apply():
    names = ["x", "y", "z"]
    assert of([0, 1, 1], "multi_label", None, names) == ["y", "z"]
    assert of([0, 0, 0], "multi_label", None, names) == []
    assert of([0, 2], "multi_label", None, names) == ["x", "z"]  # control: numbers of names
    assert of([0, 1], "multi_label") == ["0", "1"]  # may be the numbers of two classes
    assert of([0, 1], "multi_label", None, ["0", "1"]) == ["0", "1"]


def test_a_separator_that_is_given_is_the_only_one():
    assert of("Drama, crime;War", "multi_label", ";") == ["Drama, crime", "War"]
    assert of("[a];b", "multi_label", ";") == ["[a]", "b"]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("Drama, crime;War", "';' or ',' may separate .*Set `label_separator`"),
        ("['a' 'b']", "a text in brackets must be a list"),
        ("[a, b]", "a text in brackets must be a list"),
        (["a", None], r"\[1\]' holds None; expected each label"),
        (["a", ["b"]], r"holds \['b'\]; expected each label"),
        ({"a": 1}, "holds {'a': 1}; expected each label"),
        (["a", "x" * 201], "text of 201 characters"),
        ([0, 1, 0], "it looks like 0 or 1 for each of 3 classes. Set `label_names`"),
        ([1.0, 0.0], "it looks like 0 or 1 for each of 2 classes"),
        ([True, False, False], "it looks like 0 or 1 for each of 3 classes"),
        ("[0, 1, 1]", "it looks like 0 or 1 for each of 3 classes"),
        ("0;1;1", "it looks like 0 or 1 for each of 3 classes"),
    ],
)
def test_what_holds_no_several_labels_is_refused(cell, words):
    with pytest.raises(DataError, match=f"^{PLACE}: the column 'label.*{words}"):
        of(cell, "multi_label")


@pytest.mark.parametrize(
    ("cell", "number"),
    [(3, 3.0), (-0.5, -0.5), (" 4.25 ", 4.25), ("1e-3", 1e-3), (".5", 0.5), ("", None), (None, None)],
)
def test_a_number_is_a_float(cell, number):
    assert of(cell, "regression") == number
    assert number is None or type(of(cell, "regression")) is float


@pytest.mark.parametrize("cell", ["good", "3,5", "1_000", "nan", "inf", True, [1.0], float("inf"), 10**400, "1e999"])
def test_what_is_no_finite_number_is_refused(cell):
    with pytest.raises(DataError, match=f"^{PLACE}: the column 'label'.*problem: regression` needs a finite number"):
        of(cell, "regression")


def test_several_columns_of_flags_give_the_names_of_those_that_apply():
    fields = {"toxic": 1, "spam": "0", "rude": "True", "fine": False, "old": 1.0}
    columns = ["spam", "rude", "toxic", "fine", "old"]
    assert of_columns(fields, columns, "multi_label") == ["rude", "toxic", "old"]
    assert of_columns(fields, ["spam", "fine"], "multi_label") == []
    assert of_columns(fields, ["spam", "absent"], "multi_label") is None
    with pytest.raises(DataError, match=r"'toxic' holds 2; .*must hold 0 or 1"):
        of_columns({"toxic": 2, "spam": 0}, ["spam", "toxic"], "multi_label")


def test_several_columns_of_numbers_keep_their_order():
    fields = {"a": "1.5", "b": 0, "c": None}
    assert of_columns(fields, ["b", "a"], "regression") == [0.0, 1.5]
    assert of_columns(fields, ["a", "c"], "regression") is None
    with pytest.raises(DataError, match="'d' holds 'x'"):
        of_columns({"d": "x", "a": 1}, ["a", "d"], "regression")


def test_one_column_is_read_by_the_problem():
    assert of("a|b", "multi_label") == ["a", "b"]
    assert of("a|b", "single_label") == "a|b"
    assert of_columns({}, ["label"], "regression") is None


SCORES = [
    [f"{i * 0.1:.2f}" for i in range(30)],
    ["0.0", "0.5", "1.0", "1.5", "2.0"],
    ["4.5", "3", "-2"],
    ["1.0", "2.0"],
    ["1e-3", "2e-3"],
]


@pytest.mark.parametrize("names", SCORES)
def test_scores_are_asked_about(names):
    counts = dict.fromkeys(names, 20)
    with pytest.raises(DataError, match=r"r.csv: the labels look like scores.*problem: regression.*label_names"):
        check(counts, "r.csv")


@pytest.mark.parametrize("names", [["0", "1"], ["v1.0", "v2.0"], ["-1", "+1"], ["1.0", "other"], ["good.", "bad."]])
def test_classes_are_not_taken_for_scores(names):
    check(dict.fromkeys(names, 5), "r.csv")


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"sports": 5, "politics": 5, "sports;politics": 1}, "sports;politics"),
        ({"sports": 5, "politics": 5, "politics, sports": 1}, "politics, sports"),
        ({"a;b": 1, "c;d": 1, "e": 1}, "a;b"),
        ({"a|b": 2, "e": 1}, "a|b"),
        ({"['a', 'b']": 1, "['c']": 1}, "['a', 'b']"),
    ],
)
def test_several_labels_in_one_are_warned_of(counts, shown):
    with pytest.warns(UserWarning, match="several labels in one.*problem: multi_label") as told:
        check(counts)
    assert repr(shown) in str(told[0].message)


@pytest.mark.parametrize(
    "counts", [{"Washington, DC": 9, "Austin, TX": 9}, {"a;b": 1, "c": 5}, {":;": 5, "ok": 1}, {"[sic]": 3, "x": 3}]
)
def test_punctuation_alone_is_no_reason_to_warn(counts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(counts)


def test_labels_that_hardly_occur_twice_are_another_column():
    many = {f"title {i}": 1 for i in range(150)}
    with pytest.raises(DataError, match=r"t.csv: 150 rows have 150 different labels.*`label_column` probably names"):
        check(many)
    with pytest.raises(DataError, match="299 rows have 150"):
        check_single_labels(many, "t.csv", num_rows=299)
    check_single_labels(many, "t.csv", num_rows=300)
    check({f"title {i}": 1 for i in range(100)})
