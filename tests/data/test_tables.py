import codecs
from unittest.mock import Mock

import pandas as pd
import pytest

from lora_lightning.data.tables import TableReader, is_hub_name
from lora_lightning.errors import DataError, UserError


def read(path, role="train", **settings):
    return TableReader(**settings).read(str(path), role).frame


def test_csv_keeps_words_that_pandas_takes_for_missing(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text , label\r\nNA,None\r\n"two\nlines, and a\rreturn",\r\n\r\nlast,1\r\n')
    frame = read(path)
    assert list(frame.columns) == ["text", "label"]
    assert frame.values.tolist() == [["NA", "None"], ["two\nlines, and a\rreturn", ""], ["last", "1"]]


def test_tsv_and_other_separators(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\nx, y\t1\n")
    (tmp_path / "b.csv").write_text("text;label\nx, y;1\n")
    assert read(tmp_path / "a.tsv").values.tolist() == [["x, y", "1"]]
    assert read(tmp_path / "b.csv", separator=";").values.tolist() == [["x, y", "1"]]
    table = TableReader().read(str(tmp_path / "a.tsv"))
    assert table.column("text", "text_column").tolist() == ["x, y"]
    (tmp_path / "c.csv").write_text("text;label\nx;1\n")
    with pytest.raises(DataError, match=r"its columns: text;label\. It looks as if another separator is used"):
        TableReader().read(str(tmp_path / "c.csv")).column("text", "text_column")


def test_json_lines_and_arrays_keep_their_types(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\u2028y", "label": 1}\n\n{"text": "z", "label": true}\n')
    (tmp_path / "b.json").write_text('[{"text": "x", "label": 1},\n {"text": "y"}]')
    assert read(tmp_path / "a.jsonl")["label"].tolist() == [1, True]
    assert read(tmp_path / "a.jsonl")["text"].tolist() == ["x\u2028y", "z"]
    assert read(tmp_path / "b.json")["label"].tolist()[0] == 1
    assert read(tmp_path / "b.json")["label"].isna().tolist() == [False, True]


def test_parquet_equals_the_csv_it_was_made_from(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,1\ny,0\n")
    frame = read(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").values.tolist() == frame.values.tolist()


def test_folder_of_texts_takes_classes_from_its_sub_folders(tmp_path):
    for kind, texts in {"pos": ["good", "fine"], "neg": ["bad"], ".cache": ["no"], "notes": []}.items():
        (tmp_path / kind).mkdir()
        for index, text in enumerate(texts):
            (tmp_path / kind / f"{index}.txt").write_text(text)
    frame = read(tmp_path, text_column="words", label_column="kind")
    assert frame.to_dict("list") == {"words": ["bad", "good", "fine"], "kind": ["neg", "pos", "pos"]}


def test_byte_order_mark_is_no_part_of_a_column_name(tmp_path):
    (tmp_path / "a.csv").write_bytes(codecs.BOM_UTF8 + b"text,label\nx,1\n")
    assert list(read(tmp_path / "a.csv").columns) == ["text", "label"]


def test_file_in_another_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nok,1\ncafé,0\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not utf-8 \(byte 19, line 3\): set encoding .* latin-1, cp1252"):
        read(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", encoding="latin-1")["text"].tolist() == ["ok", "café"]
    (tmp_path / "b.csv").write_bytes("text,label\nx,1\n".encode("utf-16"))
    with pytest.raises(DataError, match="try utf-16"):
        read(tmp_path / "b.csv")
    with pytest.raises(DataError, match="encoding 'latin-15x' is unknown; try utf-8, latin-1"):
        read(tmp_path / "a.csv", encoding="latin-15x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", r"is empty \(0 bytes\)"),
        ("blank.csv", "\n\n", "not even a line with column names"),
        ("header.csv", "text,label\n", "holds no rows"),
        ("long.csv", "text,label\na,1\nb,c,2\n", "malformed: Expected 2 fields in line 3, saw 3"),
        ("index.csv", "text,label\na,b,1\nb,c,2\n", "malformed: Expected 2 fields in line 2, saw 3"),
        ("quote.csv", 'text,label\n"a,1\nb,2\n', "malformed: EOF inside string starting at row 1"),
        ("bad.jsonl", '{"text": "a"}\n\n{"text": oops}\n', r"bad.jsonl, line 3: this is no valid JSON"),
        ("bad.json", '[{"text": "a"},\n {"text": oops}]', "bad.json, line 2: this is no valid JSON"),
        ("list.jsonl", '{"text": "a"}\n["b", 1]\n', "list.jsonl, line 2: expected an object"),
        ("list.json", '[{"text": "a"}, 7]', "list.json, entry 2: expected an object"),
        ("deep.jsonl", "[" * 100_000, "nested too deeply"),
        ("blank.jsonl", "\n\n", "holds no rows"),
        ("bad.parquet", "nonsense", "cannot be read as Parquet"),
        ("book.xlsx", "x", "of an unknown kind: expected a name that ends in .csv"),
    ],
)
def test_malformed_files_are_told_with_their_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_without_texts(tmp_path):
    (tmp_path / "tweets.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"tweet\.csv does not exist; the nearest names there: tweets.csv"):
        read(tmp_path / "tweet.csv")
    with pytest.raises(DataError, match=r"one sub-folder for each class with \.txt files inside; .* tweets.csv"):
        read(tmp_path)
    with pytest.raises(UserError, match="not installed"):
        read("pkg://no_such_package_here/a.csv")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,1\n")
    monkeypatch.setattr("pathlib.Path.read_bytes", Mock(side_effect=PermissionError(13, "denied")))
    with pytest.raises(DataError, match="cannot be read: denied"):
        read(path)


def test_missing_and_repeated_columns_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("texts,label,label\nx,1,2\n")
    table = TableReader().read(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"no column 'text', which text_column names; its columns: texts.*mean 'texts'"):
        table.column("text", "text_column")
    with pytest.raises(DataError, match="2 columns named 'label'"):
        table.column("label", "label_column")


def test_what_is_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tweets").mkdir()
    assert is_hub_name("imdb")
    assert is_hub_name("stanfordnlp/imdb")
    for local in ("tweets", "a/b/c", "x.csv", "owner/x.JSONL", "~/x", "/x", "../x", "pkg://a/b", "a b"):
        assert not is_hub_name(local), local


@pytest.fixture
def hub(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = {
        "train": {"text": ["a", "b"], "label": [1, 0]},
        "validation": {"text": ["c", "d"], "label": [0, -1]},
    }
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(columns, features=features) for name, columns in rows.items()}
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
    return asked


def test_hub_data_set_gives_class_names_and_its_own_splits(hub):
    assert read("owner/reviews", subset="en").values.tolist() == [["a", "pos"], ["b", "neg"]]
    validation = read("owner/reviews", "val")["label"]
    assert validation.tolist()[0] == "neg"
    assert validation.isna().tolist() == [False, True]
    assert hub == [("owner/reviews", "en"), ("owner/reviews", None)]
    with pytest.raises(DataError, match="no split 'test' to use for test; it has: train, validation"):
        read("owner/reviews", "test")


def test_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, tmp_path):
    import datasets

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tweets_en").mkdir()

    def offline(*names):
        raise ConnectionError("Couldn't reach 'tweets' on the Hub\nTraceback ...")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"'tweets' is neither .* Couldn't reach .* nearest names there: tweets_en"
    ) as caught:
        read("tweets")
    assert "\n" not in str(caught.value)


def test_frame_of_strings_has_no_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n1,2\n")
    assert all(isinstance(cell, str) for cell in read(tmp_path / "a.csv").iloc[0])
    assert isinstance(read(tmp_path / "a.csv"), pd.DataFrame)
