"""Columns that one of several files lacks."""

import pytest

from lora_lightning.data import TextClassificationData
from lora_lightning.errors import DataError


@pytest.fixture
def build(tmp_path, tokenizer_folder):
    """Read several files, each of one table."""

    def _build(files, **settings):
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        paths = [str(tmp_path / name) for name in files]
        data = TextClassificationData(paths, tokenizer=tokenizer_folder, val_size=0, test_size=0, **settings)
        data.setup("fit")
        return [(one.text, one.label) for one in data.examples("train")]

    return _build


FIRST = "text,label\nw1,a\nw2,b\n"


@pytest.mark.parametrize(
    ("second", "settings", "message"),
    [
        ("content,label\nw3,a\n", {}, r"b\.csv has no column 'text', which text_column names; its columns: content"),
        ("text,kind\nw3,a\n", {}, r"b\.csv has no column 'label', which label_column names"),
        ("text,label,lang\nw3,a,de\n", {"where": ["lang == 'de'"]}, r"a\.csv has no column 'lang', which where names"),
    ],
)
def test_a_table_without_a_column_is_refused_by_name(build, second, settings, message):
    with pytest.raises(DataError, match=message):
        build({"a.csv": FIRST, "b.csv": second}, **settings)


def test_rows_without_a_cell_are_left_out(build):
    assert build({"a.csv": FIRST, "b.csv": "text,label\nw3\nw4,a\n"})[2:] == [("w4", "a")]
    lines = '{"content": "w3", "label": "a"}\n'  # keys of JSON may be optional
    assert len(build({"a.csv": FIRST, "b.jsonl": lines})) == 2
