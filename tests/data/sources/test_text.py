"""Encodings and compression of text files."""

import random
from pathlib import Path
from unittest.mock import Mock

import pytest

from lora_lightning.data.sources import read_records
from lora_lightning.errors import DataError
from tests.data.sources.conftest import SUFFIXES, compress, fields_of, read, tolerant

CSV = 'text,label\n"a, b",00\né “c”,NA\n"two\nlines",\n'.encode()
ROWS = [{"text": "a, b", "label": "00"}, {"text": "é “c”", "label": "NA"}, {"text": "two\nlines", "label": ""}]


def test_file_in_another_encoding(write):
    path = write("a.csv", "text,label\nok,1\ncafé,0\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not utf-8 \(byte 19, line 3\): set encoding .* latin-1, cp1252"):
        fields_of(path)
    assert [row["text"] for row in fields_of(path, encoding="latin-1")] == ["ok", "café"]
    for unknown in ("latin-15x", "hex"):
        with pytest.raises(DataError, match=f"encoding '{unknown}' is unknown; try utf-8, latin-1"):
            fields_of(path, encoding=unknown)


@pytest.mark.parametrize(
    ("name", "lines", "left"),
    [
        ("a.jsonl", [b'{"n": 1}', b'{"n": "caf\xe9"}', b'{"n": 3}'], [{"n": 1}, {"n": 3}]),
        ("a.csv", [b"n,m", b'"x\ny",1', b"caf\xe9,2", b"z,3"], [{"n": "x\ny", "m": "1"}, {"n": "z", "m": "3"}]),
        ("a.csv", [b"n,m", b'"x\ncaf\xe9",1', b"z,3"], [{"n": "z", "m": "3"}]),
        ("a.conll", [b"a O", b"", b"caf\xe9 O", b"b O", b"", b"c O"], [{"tokens": ["a"], "tags": ["O"]}] * 2),
        ("a.jsonl", [b'{"n": 1}', b'{"n": 2}\xe9'], [{"n": 1}]),
    ],
)
def test_a_line_that_cannot_be_decoded_is_one_bad_row(write, name, lines, left):
    content = b"\n".join(lines)
    path = write(name, content)
    with pytest.raises(DataError, match="is not utf-8"):
        fields_of(path, conll=True)
    records, (message,), (text,) = tolerant(path, conll=True)
    wrong = content.index(b"\xe9")
    line = content[:wrong].count(b"\n") + 1
    assert f"(byte {wrong}, line {line})" in message
    assert "\ufffd" in text
    left = [{**row, "tokens": ["c"]} if number and "tokens" in row else row for number, row in enumerate(left)]
    assert [dict(record.fields) for record in records] == left
    assert len(read(write(name, content.replace(b"\xe9", b" ")), conll=True)) == len(left) + 1  # control


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "shift_jis", "gb18030"])
def test_encodings_of_several_bytes(write, encoding):
    texts = [
        f"東京 \u010a{number}".replace("\u010a", "" if encoding == "shift_jis" else "Ċ\u2028") for number in range(9000)
    ]
    path = write("a.csv", ("text\n" + "\n".join(texts) + "\n").encode(encoding))
    assert [row["text"] for row in fields_of(path, encoding=encoding)] == texts
    bom = write("b.csv", "\ufefftext\nx".encode("utf-16-le"))
    assert fields_of(bom, encoding="utf-16-le") == [{"text": "x"}]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_utf_16_is_recognised(write, name):
    with pytest.raises(DataError, match="try utf-16"):
        fields_of(write(name, "text,label\nx,1\n".encode("utf-16")))
    cut = "text,label\nx,1\n".encode("utf-16-le") + b"\x00\xd8"
    with pytest.raises(DataError, match=r"is not utf-16-le \(byte 30, line 3\)"):
        fields_of(write("b.csv", cut), encoding="utf-16-le")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_compressed_files_are_read_alike(write, suffix):
    path = write(f"a.csv{suffix}", compress(CSV, suffix))
    assert fields_of(path) == ROWS
    assert [record.place for record in read(path)] == [f"{path}, line {number}" for number in (2, 3, 4)]
    lines = write(f"a.jsonl{suffix}", compress(b'{"n": 1}\n\n{"n": 2}', suffix))
    assert fields_of(lines) == [{"n": 1}, {"n": 2}]
    array = write(f"a.json{suffix}", compress(b'[{"n": 1}]', suffix))
    assert fields_of(array) == [{"n": 1}]
    yaml = write(f"a.yml{suffix}", compress(b"conversations:\n- - Is it?\n  - Yes\n", suffix))
    assert fields_of(yaml) == [{"dialogue": ["Is it?", "Yes"]}]
    words = write(f"a.conll{suffix}", compress(b"Anna B-PER\nruns O\n", suffix))
    assert fields_of(words, conll=True) == [{"tokens": ["Anna", "runs"], "tags": ["B-PER", "O"]}]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_damaged_files_are_told(write, suffix):
    whole = compress(("n\n" + "".join(f"{random.Random(n).random()}\n" for n in range(9000))).encode(), suffix)
    assert len(fields_of(write(f"whole.csv{suffix}", whole))) == 9000
    middle = len(whole) // 2
    for content in (b"not compressed at all", whole[:-12], whole[:middle] + b"\xff" * middle):
        with pytest.raises(DataError, match=rf"v1\.a\.csv\{suffix}.*Check that the file is whole") as caught:
            fields_of(write(f"v1.a.csv{suffix}", content))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_the_beginning_is_read_for_the_first_record(write, suffix):
    """The rest of the file is noise, which no reader could decompress."""
    draw = random.Random(1)
    lines = "".join(f'{{"text": "{draw.random()}"}}\n' for _ in range(200_000)).encode()
    content = bytearray(compress(lines, suffix))
    half = len(content) // 2
    content[half:] = b"\xff" * (len(content) - half)
    records = read_records(write(f"a.jsonl{suffix}", bytes(content)))
    assert list(next(records).fields) == ["text"]
    with pytest.raises(DataError):
        list(records)


def test_unreadable_file(write, monkeypatch):
    path = write("a.csv", "text,label\nx,1\n")
    assert fields_of(path)  # control
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "denied")))
    with pytest.raises(DataError, match=r"a\.csv cannot be read: denied\."):
        fields_of(path)
