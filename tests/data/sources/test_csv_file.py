import codecs
import csv
import io
import random
import warnings

import pytest

from lora_lightning.data.sources import csv_file, read_records
from lora_lightning.errors import ConfigError, DataError
from tests.data.sources.conftest import fields_of, read, tolerant


def places(records):
    return [(record.number, record.fields["text"]) for record in records]


def test_cells_stay_as_written(write):
    path = write("a.csv", b'text , label\r\nNA,None\r\n"two\nlines, and a\rreturn",\r\n\r\n  \nlast ,00\r\n""\n,\n')
    assert fields_of(path) == [
        {"text": "NA", "label": "None"},
        {"text": "two\nlines, and a\rreturn", "label": ""},
        {"text": "last ", "label": "00"},
        {"text": ""},
        {"text": "", "label": ""},
    ]
    assert [record.number for record in read(path)] == [2, 3, 7, 8, 9]
    assert {record.unit for record in read(path)} == {"line"}
    assert fields_of(write("a.tsv", "a\tb\n\t\n\n1\t2\n")) == [{"a": "", "b": ""}, {"a": "1", "b": "2"}]


def test_rows_after_a_field_of_many_lines_keep_their_numbers(write):
    path = write("a.csv", 'text,label\n"a\n\nb\n""c""",1\nx,2\n"y\nz",3\n\nlast,4\n')
    assert places(read(path)) == [(2, 'a\n\nb\n"c"'), (6, "x"), (7, "y\nz"), (10, "last")]


def test_what_csv_writes_is_read_back(write):
    draw = random.Random(0)
    pieces = ['"', ",", "\n", "\r\n", "a", " ", "é", '""', "\t", ";", "\u2028", "\x85", "\x0c"]
    rows = [["".join(draw.choices(pieces, k=draw.randrange(6))) for _ in range(3)] for _ in range(500)]
    for separator in (",", ";", "\t"):
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([["a", "b", "c"], *rows])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some cells look like rows
            found = fields_of(write("a.csv", buffer.getvalue()), separator=separator)
        assert found == [dict(zip("abc", row, strict=True)) for row in rows]


def test_separators(write):
    assert fields_of(write("a.tsv", "text\tlabel\nx, y\t1\n")) == [{"text": "x, y", "label": "1"}]
    semicolons = write("b.csv", "text;label\nx, y;1\n")
    assert fields_of(semicolons, separator=";") == [{"text": "x, y", "label": "1"}]
    with pytest.raises(DataError, match="expected 1 fields, as the first line has, and found 2"):
        fields_of(semicolons)
    for wrong in ("::", '"', "\n", "\\t"):
        with pytest.raises(ConfigError, match="expected one character"):
            fields_of(semicolons, separator=wrong)


def test_fields_may_be_long(write):
    text = "x" * 300_000
    assert fields_of(write("a.csv", f'text\n{text}\n"{text}"\n')) == [{"text": text}] * 2
    lines = "line\n" * 30_000
    assert places(read(write("b.csv", f'text\n"{lines}"\nlast\n'))) == [(2, lines), (30_003, "last")]


def test_byte_order_mark_is_no_part_of_a_name(write):
    content = codecs.BOM_UTF8 + b"text,label\nx,1\n"
    for encoding in ("utf-8", "UTF8", "utf-8-sig"):
        assert list(fields_of(write("a.csv", content), encoding=encoding)[0]) == ["text", "label"]


def test_repeated_names_are_numbered_so_that_neither_is_taken(write):
    path = write("a.csv", "label,text, label\n1,x,2\n")
    assert fields_of(path) == [{"label (column 1)": "1", "text": "x", "label (column 3)": "2"}]


def test_every_cell_is_a_text(write):
    assert fields_of(write("a.csv", "a,b,c\n1,0.5,true\n")) == [{"a": "1", "b": "0.5", "c": "true"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n\n", " is empty: it has not even a line with column names"),
        ("\n \n", " is empty: it has not even a line with column names"),
        ("text,label\n", " holds no rows; give a source with at least one"),
        ("text,label\na,1\nb,c,2\n", ", line 3: expected 2 fields, as the first line has, and found 3"),
        ("text,label\na,b,1\nb,c,2\n", ", line 2: expected 2 fields, as the first line has, and found 3"),
        ('text,label\n"a,1\nb,2\n', ", line 2: a quotation mark that opens a field is not closed"),
        ('text,label\nx,1\n"a,1\nb "c",2\n', ", line 3: text follows the quotation mark that closes a field"),
        ('text,label\nx,1\n"a" b,1\n', ", line 3: text follows the quotation mark that closes a field"),
        ("text,label\nx\ry,2\n", ", line 2: new-line character seen in unquoted field"),
        ('text,"label\nx,1\n', ", line 1: a quotation mark that opens a field is not closed"),
    ],
)
def test_malformed_files_are_refused_with_their_line(write, content, message):
    with pytest.raises(DataError, match=rf"a\.csv{message}") as caught:
        fields_of(write("a.csv", content))
    assert "\n" not in str(caught.value)
    if "quotation" in message:
        assert "Write a quotation mark inside a quoted field twice" in str(caught.value)


# Broken rows are skipped.


def test_rows_after_a_broken_one_are_not_lost(write):
    """Two texts of thirty begin with a quotation mark that is not closed."""
    lines = [f'"film {i} said,a' if i in (5, 20) else f"film {i},b" for i in range(30)]
    path = write("a.csv", "\n".join(["text,label", *lines]) + "\n")
    records, messages, texts = tolerant(path)
    assert places(records) == [(i + 2, f"film {i}") for i in range(30) if i not in (5, 20)]
    assert [text.strip() for text in texts] == ['"film 5 said,a', '"film 20 said,a']
    assert "line 7: text follows the quotation mark" in messages[0]
    assert "line 22: a quotation mark that opens a field is not closed" in messages[1]
    with pytest.raises(DataError, match="line 7"):
        read(path)


def test_rows_with_too_many_fields_are_skipped_whole(write):
    path = write("a.csv", 'text,label\n"one\ntwo, x\nthree",a,b\nlast,c\n')
    records, messages, texts = tolerant(path)
    assert places(records) == [(5, "last")]
    assert texts == ["one\ntwo, x\nthree,a,b"]
    assert "line 2: expected 2 fields" in messages[0]


def test_several_broken_rows_one_after_another(write):
    path = write("a.csv", 'text,label\na,1\n"b" c,1\n"d" e,1\n"f,1\ng,2\nh,1,2\ni,3\n')
    records, messages, _ = tolerant(path)
    assert places(records) == [(2, "a"), (6, "g"), (8, "i")]
    assert [message.split(":")[0].rsplit(" ", 1)[1] for message in messages] == ["3", "4", "5", "7"]


def test_a_row_that_does_not_end_is_given_up_early(write, monkeypatch):
    """The search for its closing quotation mark ends after so many characters; all lines but its first are rows."""
    path = write("a.csv", 'text,label\n"open,1\n' + "".join(f"x{n},1\n" for n in range(30)) + '"y",1\n')
    expected = [(n + 3, f"x{n}") for n in range(30)] + [(33, "y")]
    for longest in (12, 60, 10_000):
        monkeypatch.setattr(csv_file, "_LONGEST_ROW", longest)
        records, messages, texts = tolerant(path)
        assert places(records) == expected
        assert (len(messages), texts) == (1, ['"open,1\n'])
    monkeypatch.setattr(csv_file, "_LONGEST_ROW", 3)  # control: no row is so short
    with pytest.raises(DataError, match="line 1"):
        tolerant(path)


def test_a_broken_line_of_names_is_never_skipped(write):
    with pytest.raises(DataError, match="line 1: a quotation mark that opens"):
        tolerant(write("a.csv", '"text,label\na,1\nb,2\n'))


def test_shares_count_broken_rows_and_tell_of_their_own(write):
    path = write("a.csv", 'text,label\na,1\nb,c,d\n"e" x,2\nf,3\ng,4\n')
    for mine, kept, broken in ((0, [(2, "a"), (6, "g")], "line 4"), (1, [(5, "f")], "line 3")):
        told = []
        records = read_records(path, on_bad=lambda *bad, told=told: told.append(bad), share=(mine, 2))
        assert places(records) == kept
        assert [broken in str(error) for error, _ in told] == [True]
    with pytest.raises(DataError, match="line 4"):
        read(path, share=(0, 2))
    with pytest.raises(DataError, match="line 3"):
        read(path, share=(1, 2))


# Rows inside a field.


def test_fields_whose_lines_look_like_rows_are_warned_of_once(write):
    content = 'text,label\nx,1\n"open,1\na,1\nb,2\nc",3\n"d,1\ne,2\nf",1\n'
    with pytest.warns(UserWarning, match=r"a\.csv, line 3: a quoted text holds lines that look like rows") as caught:
        assert len(fields_of(write("a.csv", content))) == 3
    assert len(caught) == 1


@pytest.mark.parametrize(
    "content",
    [
        'text,label\n"a, b\nc",1\n',  # one line with a separator
        'text,label\n"a, b, c\nd, e, f\ng, h, i",1\n',  # too many separators
        'text\n"a\nb\nc"\n',  # one column
    ],
)
def test_other_fields_of_many_lines_are_not_warned_of(write, content):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(fields_of(write("a.csv", content))) == 1


def test_rows_are_read_as_they_are_asked_for(write):
    records = read_records(write("a.csv", "text,label\n" + "a,1\n" * 100_000 + "b,c,d\n"))
    assert next(records).fields == {"text": "a", "label": "1"}
    with pytest.raises(DataError, match="line 100002"):
        list(records)
