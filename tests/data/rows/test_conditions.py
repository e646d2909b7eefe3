import pytest

from lora_lightning.data.rows.cells import is_missing, missing_column
from lora_lightning.data.rows.columns import ColumnWatch
from lora_lightning.data.rows.conditions import Condition, parse_condition
from lora_lightning.data.sources import Record
from lora_lightning.errors import ConfigError, DataError

COLUMNS = {
    "confidence": ["1", "0.5", "", "n/a", "0.6"],
    "lang": ["en", "de", "en", " ", "fr"],
    "checked": [True, False, None, "true", 3],
    "my score": [1, 2, 3, 4, 5],
    "mixed": [[1], 2, "x", {"a": 1}, None],
}


def records(**columns):
    rows = zip(*columns.values(), strict=True)
    return [
        Record("tweets.csv", line, "line", dict(zip(columns, row, strict=True))) for line, row in enumerate(rows, 2)
    ]


def admitted(found, *conditions, columns=None):
    """Which records meet all conditions; refuses what the watch refuses."""
    watch = ColumnWatch("tweets.csv", columns or {}, list(map(parse_condition, conditions)))
    answers = [watch.admits(record) for record in found]
    watch.check()
    return answers


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("confidence >= 0.6", [1, 0, 0, 0, 1]),
        ("confidence>=.6", [1, 0, 0, 0, 1]),
        ("confidence < 1e0", [0, 1, 0, 0, 1]),
        ("confidence != 1", [0, 1, 0, 0, 1]),  # what is missing or no number never meets a condition
        ("confidence == '1'", [1, 0, 0, 0, 0]),
        ("lang == 'en'", [1, 0, 1, 0, 0]),
        ('lang != "en"', [0, 1, 0, 0, 1]),
        ("lang != ''", [1, 1, 1, 0, 1]),
        ("checked == true", [1, 0, 0, 1, 0]),
        ("checked == False", [0, 1, 0, 0, 0]),
        ("`my score` > -2.5", [1, 1, 1, 1, 1]),
        ("mixed <= 2", [0, 1, 0, 0, 0]),
    ],
)
def test_rows_that_meet_a_condition(text, met):
    expected = [bool(one) for one in met]
    condition = parse_condition(text)
    assert [condition.met_by(record.fields) or False for record in records(**COLUMNS)] == expected
    assert admitted(records(**COLUMNS), text) == expected


def test_rows_meet_all_conditions():
    found = records(**COLUMNS)
    assert admitted(found, "confidence >= 0.5", "lang == 'en'") == [True, False, False, False, False]
    assert admitted(found) == [True] * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("confidence", "cannot be read: expected a column"),
        ("confidence = 0.6", "cannot be read"),
        ("confidence >= 0.6 and lang == 'en'", "value \"0.6 and lang == 'en'\""),
        ("confidence >= __import__('os')", "value .* cannot be read"),
        ("confidence >= nan", "value 'nan'"),
        ("lang == en", "Put a text in quotes: lang == 'en'"),
        ("lang == 'it's'", "cannot be read"),
        ("lang >= 'en'", "compares by >=, which takes a number without quotes"),
        ("checked < true", "compares by <"),
        ("", "cannot be read"),
        ("0.6 <= confidence", "value 'confidence'"),
    ],
)
def test_other_grammar_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_condition(text)


def test_conditions_that_cannot_be_met_are_told():
    found = records(**COLUMNS)
    with pytest.raises(DataError, match=r"no column 'confidance', which where names.*Did you mean 'confidence'"):
        admitted(found, "confidance >= 0.6")
    with pytest.raises(DataError, match=r"'lang > 2.0' cannot be met: no cell of the column is a number .*'en'"):
        admitted(found, "lang > 2")
    with pytest.raises(DataError, match="no cell of the column is true or false"):
        admitted(found, "lang == true")
    with pytest.raises(DataError, match=r"'lang > 2.0' cannot be met"):  # however few rows the other one leaves
        admitted(found, "confidence > 5", "lang > 2")


def test_a_column_without_any_value_meets_nothing():
    assert admitted(records(score=["", None]), "score > 1") == [False, False]


def test_conditions_are_written_as_they_are_read():
    assert str(parse_condition("lang=='en'")) == "lang == 'en'"
    assert parse_condition(str(Condition("a", "<=", 0.5))) == Condition("a", "<=", 0.5)


def test_what_is_missing():
    assert [is_missing(cell) for cell in (None, "", " \t", float("nan"))] == [True] * 4
    assert [is_missing(cell) for cell in ("a", 0, False, [], {})] == [False] * 5


# Columns.


def test_columns_may_come_with_any_record():
    some = [Record("a.jsonl", 1, "line", {"text": "x"}), Record("a.jsonl", 2, "line", {"label": "y"})]
    assert admitted(some, columns={"text": "text_column", "label": "label_column"}) == [True, True]
    with pytest.raises(DataError, match=r"has no column 'label', which label_column names; its columns: text\."):
        admitted(some[:1], columns={"text": "text_column", "label": "label_column"})


def test_missing_columns_are_told():
    error = missing_column("a.csv", "text", "text_column", ["texts", "label"])
    assert str(error) == (
        "a.csv has no column 'text', which text_column names; its columns: texts, label. Did you mean 'texts'?"
    )
    assert "It looks as if another separator is used" in str(missing_column("a.csv", "text", "t", ["text;label"]))
    assert "separator" not in str(missing_column("a.csv", "text", "t", ["text;label", "b"]))
    assert str(missing_column("a.csv", "x", "t", map(str, range(25)))).endswith("19 and 5 more.")
