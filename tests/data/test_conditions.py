import pandas as pd
import pytest

from lora_lightning.data.conditions import Condition, parse_condition
from lora_lightning.data.tables import Table
from lora_lightning.errors import ConfigError, DataError

TABLE = Table(
    "tweets.csv",
    pd.DataFrame(
        {
            "confidence": ["1", "0.5", "", "n/a", "0.6"],
            "lang": ["en", "de", "en", " ", "fr"],
            "checked": [True, False, None, "true", 3],
            "my score": [1, 2, 3, 4, 5],
            "mixed": [[1], 2, "x", {"a": 1}, None],
        }
    ),
)


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
    assert parse_condition(text).met_by(TABLE).tolist() == [bool(one) for one in met]


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
    with pytest.raises(DataError, match=r"no column 'confidance', which where names.*Did you mean 'confidence'"):
        parse_condition("confidance >= 0.6").met_by(TABLE)
    with pytest.raises(DataError, match=r"'lang > 2.0' cannot be met: no cell of the column is a number .*'en'"):
        parse_condition("lang > 2").met_by(TABLE)
    with pytest.raises(DataError, match="no cell of the column is true or false"):
        parse_condition("lang == true").met_by(TABLE)


def test_a_column_without_any_value_meets_nothing():
    empty = Table("x", pd.DataFrame({"score": ["", None]}))
    assert parse_condition("score > 1").met_by(empty).tolist() == [False, False]


def test_conditions_are_written_as_they_are_read():
    assert str(parse_condition("lang=='en'")) == "lang == 'en'"
    assert parse_condition(str(Condition("a", "<=", 0.5))) == Condition("a", "<=", 0.5)
