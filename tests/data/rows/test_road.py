"""From records to divided rows: what is counted, dropped, kept together and written."""

import itertools
import json
from collections import Counter

import pytest

from lora_lightning.data.rows.cells import is_missing
from lora_lightning.data.rows.conditions import parse_condition
from lora_lightning.data.rows.named_sets import split_sources
from lora_lightning.data.rows.plan import Plan
from lora_lightning.data.rows.pool import SplitRows, fingerprint, load_about, save_about, split_file
from lora_lightning.data.rows.road import lay
from lora_lightning.data.rows.row import Row
from lora_lightning.data.sources import ReadSettings
from lora_lightning.errors import ConfigError, DataError


class Labelled:
    """Texts with a label each."""

    def __init__(self):
        self.checked = None

    def columns_read(self, split):
        return {"text": "text_column"} if split == "predict" else {"text": "text_column", "label": "label_column"}

    def read_row(self, record, split, ignored):
        ignored.update(record.fields.keys() - {"text", "label"})
        text, label = record.fields.get("text"), record.fields.get("label")
        if split == "predict":
            return Row([text or "", None], text or "")
        if is_missing(text) or is_missing(label):
            return None
        if label == "broken":
            raise DataError(f"{record.place}: broken.")
        return Row([text, label], text, (label,))

    def check_labels(self, labels, num_rows):
        self.checked = {name: count for name, (count, _) in labels.items()}, num_rows


class Laid:
    """Rows laid out in a folder."""

    def __init__(self, folder, train, val=None, test=None, predict=None, *, sizes=(None, 0, 0), where=(), **settings):
        self.folder = folder
        folder.mkdir()
        self.rules = Labelled()
        plan = Plan(
            sources=split_sources({"train": train, "val": val, "test": test, "predict": predict}),
            sizes=dict(zip(("train", "val", "test"), sizes, strict=True)),
            settings=ReadSettings(),
            conditions=tuple(map(parse_condition, where)),
            **{"stratified": True, **settings},
        )
        self.about = lay(plan, folder, self.rules)

    def rows(self, split="train"):
        return [tuple(content) for content in SplitRows(self.folder, split, self.about)]

    def counted(self, *names):
        return tuple(self.about.counts[name] for name in names)


def rows_of(*pairs):
    return [{"text": text, "label": label} for text, label in pairs]


def many(count, start=0):
    return rows_of(*((f"text {index}", "ab"[index % 2]) for index in range(start, start + count)))


@pytest.fixture
def laid(tmp_path):
    folders = iter(tmp_path / f"laid{index}" for index in range(50))
    return lambda *sources, **settings: Laid(next(folders), *sources, **settings)


# What becomes of rows.


def test_rows_without_text_or_label_are_dropped_and_counted(laid):
    cells = [("a", "x"), (None, "x"), ("c", ""), (" \t", "x"), ("e", float("nan")), ("f", "y")]
    source = [{**row, "score": score} for row, score in zip(rows_of(*cells), (1, 1, 1, 1, 1, 0), strict=True)]
    found = laid(source)
    assert found.rows() == [("a", "x"), ("f", "y")]
    assert found.counted("rows_read", "rows_filtered", "rows_incomplete", "train") == (6, 0, 4, 2)
    assert found.about.ignored == Counter(score=6)
    found = laid(source, where=["score > 0", "score < 9"])
    assert found.rows() == [("a", "x")]
    assert found.counted("rows_read", "rows_filtered", "rows_incomplete", "train") == (6, 1, 4, 1)


def test_all_rows_gone_is_an_error_that_says_why(laid):
    one = [{"text": "a", "label": "x", "score": 1}]
    with pytest.raises(DataError, match=r"none of the 1 rows can be used: no row meets score > 5.0 and score < 9.0"):
        laid(one, where=["score > 5", "score < 9"])
    with pytest.raises(DataError, match="none of the 2 rows can be used: none has a text and a label"):
        laid(rows_of(("a", ""), ("", "x")), needed="a text and a label")
    with pytest.raises(DataError, match="has no column 'label', which label_column names"):
        laid([{"text": "a"}])


COPIES = rows_of(("a", "0"), ("b", "1"), ("a", "0"), ("c", "0"), ("d", "1"), ("c", "1"), ("c", "0"))


def test_duplicates_keep_the_first_and_contradictions_none(laid):
    found = laid(COPIES)
    assert found.rows() == [("a", "0"), ("b", "1"), ("d", "1")]
    assert found.counted("duplicates_dropped", "contradictions_dropped", "train") == (1, 3, 3)
    assert found.rules.checked == ({"0": 1, "1": 2}, 3)
    assert found.about.train_labels == {"0": 1, "1": 2}
    exact = rows_of(("a", "0"), ("A", "1"), ("a ", "0"))
    assert [text for text, _ in laid(exact).rows()] == ["a", "A", "a "]  # exact copies only


def test_a_label_that_only_contradictory_rows_had_is_no_class(laid):
    found = laid(rows_of(("a", "0"), ("b", "1"), ("c", "2"), ("c", "3")))
    assert found.rules.checked == ({"0": 1, "1": 1}, 2)
    assert set(found.about.labels["train"]) == {"0", "1"}


def test_without_classes_rows_of_one_group_may_differ(laid):
    found = laid(COPIES, stratified=False)
    assert found.rows() == [("a", "0"), ("b", "1"), ("c", "0"), ("d", "1"), ("c", "1")]
    assert found.counted("duplicates_dropped", "contradictions_dropped") == (2, 0)


@pytest.mark.parametrize("stratified", [True, False])
def test_copies_that_are_kept_stay_in_one_split(laid, stratified):
    source = many(40) + many(40) + many(20)
    found = laid(source, sizes=(None, 10, 10), duplicates="keep", stratified=stratified)
    texts = {split: [text for text, _ in found.rows(split)] for split in ("train", "val", "test")}
    assert Counter(itertools.chain(*texts.values())) == Counter(row["text"] for row in source)
    assert not set(texts["val"]) & set(texts["test"])
    assert not set(texts["train"]) & (set(texts["val"]) | set(texts["test"]))
    assert found.counted("duplicates_dropped", "contradictions_dropped", "unused") == (0, 0, 0)
    dropped = laid(source, sizes=(None, 10, 10), stratified=stratified)
    assert dropped.counted("duplicates_dropped", "train", "val", "test") == (60, 20, 10, 10)


def test_other_settings_are_refused(laid):
    for wrong in ({"duplicates": "both"}, {"bad_rows": "mend"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is '.*': expected .* or"):
            laid(many(4), **wrong)
    with pytest.raises(ConfigError, match="val_size is 3, but val names rows of its own"):
        laid(many(4), many(4), sizes=(None, 3, 0))


# Leaks.


def test_rows_that_are_trained_on_too_are_counted_and_told(laid):
    with pytest.warns(UserWarning, match=r"2 of 4 rows of a list of 4 rows have a text that is trained on") as caught:
        found = laid(many(20), many(4, start=18), many(4, start=30), many(4))
    assert len(caught) == 1  # neither of test, which has others, nor of predict
    assert found.counted("leaked", "train", "val", "test") == (2, 20, 4, 4)
    assert laid(many(20), many(4, start=20)).counted("leaked") == (0,)
    with pytest.warns(UserWarning, match="1 of 1 rows"):  # the label does not matter
        assert laid(many(20), rows_of(("text 0", "b"))).counted("leaked") == (1,)


def test_rows_that_were_not_drawn_do_not_leak(laid):
    """Half of the rows are trained on, and every one of them stands in the source for validation too."""
    with pytest.warns(UserWarning, match="10 of 20 rows"):
        found = laid(many(20), many(20), sizes=(10, None, 0))
    assert found.counted("leaked", "unused") == (10, 10)


def test_several_validation_sets_are_counted_apart(laid):
    val = {"near": many(4, start=18), "far": many(3, start=40)}
    with pytest.warns(UserWarning, match=r"2 of 4 rows .* the figures for val/near will be too good") as caught:
        found = laid(many(20), val)
    assert len(caught) == 1
    assert (found.rows("val/near"), len(found.rows("val/far"))) == (
        [(f"text {i}", "ab"[i % 2]) for i in range(18, 22)],
        3,
    )
    assert found.counted("train", "val", "val/near", "val/far") == (20, 7, 4, 3)
    assert found.counted("leaked", "val/near/leaked", "val/far/leaked") == (2, 2, 0)
    with pytest.raises(ConfigError, match="val_size is 3, but val names rows of its own"):
        laid(many(4), val, sizes=(None, 3, 0))


# Broken rows.


BROKEN = '{"text": "a", "label": "0"}\n{oops\n{"text": "b", "label": "broken", "n": 1}\n{"text": "c", "label": "1"}\n'


def test_broken_rows_are_refused_or_left_out(laid, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(BROKEN)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: this is not valid JSON"):
        laid(str(path))
    found = laid(str(path), bad_rows="skip")
    assert found.rows() == [("a", "0"), ("c", "1")]
    assert found.counted("rows_read", "rows_bad", "train") == (3, 2, 2)
    (malformed, line), (refused, fields) = found.about.bad
    assert ("line 2" in malformed, line.strip()) == (True, "{oops")
    assert (refused, json.loads(fields)) == (f"{path}, line 3: broken.", {"text": "b", "label": "broken", "n": 1})
    path.write_text(BROKEN.replace("{oops\n", ""))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: broken\."):
        laid(str(path))


def test_only_broken_rows_are_refused(laid, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{oops\n" * 3)
    with pytest.raises(
        DataError, match=r"a\.jsonl: no row can be used: 3 are broken; the first: .* line 1: this is not valid"
    ):
        laid(str(path), bad_rows="skip")


# Rows to predict.


def test_rows_to_predict_keep_every_row_in_place(laid):
    source = rows_of(("b", "0"), (None, "0"), ("b", None))
    found = laid(many(4), None, None, source, where=["label == 'a'"])
    assert found.rows("predict") == [("b", None), ("", None), ("b", None)]
    assert found.counted("rows_read", "rows_filtered") == (4, 2)  # those of train


# What is written.


def test_rows_know_where_they_stand(laid, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{name}1,0\n\n{name}2,1\n")
    found = laid([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    rows = SplitRows(found.folder, "train", found.about)
    places = {rows.content(index)[0]: rows.place(index) for index in range(len(rows))}
    assert places["a2"] == (str(tmp_path / "a.csv"), "line", 4)
    assert places["b1"] == (str(tmp_path / "b.csv"), "line", 2)
    stored = [row for _, batch in rows.batches() for row in batch]
    assert {row.content[0]: row.place for row in stored}["b2"] == f"{tmp_path}/b.csv, line 4"
    assert found.about.labels["train"]["1"] == (2, f"{tmp_path}/a.csv, line 4")


def test_rows_of_tens_of_thousands_of_files_know_where_they_stand(laid, monkeypatch):
    from lora_lightning.data.rows import road
    from lora_lightning.data.sources import Record

    def records(*_, **__):
        return (
            Record(f"{index}.txt", 1, "line", {"text": f"t{index}", "label": "ab"[index % 2]})
            for index in range(40_000)
        )

    monkeypatch.setattr(road, "read_records", records)
    found = laid("texts")
    assert SplitRows(found.folder, "train", found.about).place(39_999) == ("39999.txt", "line", 1)


def test_splits_hold_every_row_once_in_the_order_of_the_source(laid):
    source = many(5001)
    found = laid(source, sizes=(None, 0.1, 20))
    order = {row["text"]: index for index, row in enumerate(source)}
    places = {split: [order[text] for text, _ in found.rows(split)] for split in ("train", "val", "test")}
    assert sorted(itertools.chain(*places.values())) == list(range(5001))
    assert all(rows == sorted(rows) for rows in places.values())
    assert {split: len(rows) for split, rows in places.items()} == found.about.num_rows
    assert [path.name for path in sorted(found.folder.iterdir())] == ["test.arrow", "train.arrow", "val.arrow"]
    starts = [(start, len(rows)) for start, rows in SplitRows(found.folder, "train", found.about).batches()]
    assert [start for start, _ in starts] == [sum(size for _, size in starts[:index]) for index in range(len(starts))]
    other = laid(source, sizes=(None, 0.1, 20), seed=1)
    assert other.rows("val") != found.rows("val")
    assert laid(source, sizes=(None, 0.1, 20)).rows("val") == found.rows("val")


def test_named_sets_have_files_of_their_own(tmp_path):
    (tmp_path / "laid").mkdir()
    sources = {"train": many(10), "val/one": many(2, start=20), "val/two": many(4, start=30)}
    sizes = {"train": None, "val": None, "test": 0}
    plan = Plan(sources=sources, sizes={**sizes, "val": 0}, settings=ReadSettings(), stratified=True)
    about = lay(plan, tmp_path / "laid", Labelled())
    assert about.num_rows == {"train": 10, "val/one": 2, "val/two": 4}
    assert about.counts["val"] == 6
    assert split_file(tmp_path, "val/one").name == "val.one.arrow"


def test_what_is_known_of_rows_is_read_back(laid, tmp_path):
    found = laid([*many(20), {"text": None, "label": "a", "n": 1}], sizes=(None, 4, 0))
    save_about(found.about, found.folder)
    again = load_about(found.folder)
    assert again.counts == found.about.counts
    rows = SplitRows(found.folder, "val", again)
    assert [tuple(content) for content in rows] == found.rows("val")
    assert rows.place(0) == SplitRows(found.folder, "val", found.about).place(0)
    assert again.fingerprint == found.about.fingerprint
    assert again.train_labels == found.about.train_labels


# The fingerprint.


def test_fingerprint_changes_with_every_part(laid):
    train, val = rows_of(("a", "0"), ("b", "1")), rows_of(("c", "0"))

    def of(*sources, names=("0", "1"), **settings):
        found = laid(*sources, **settings)
        return fingerprint(found.folder, found.about.num_rows, names)

    own = of(train, val)
    assert len(own) == 64
    assert own == of(train, val) == of(train, val, None, rows_of(("x", "0")))  # rows to predict do not count
    others = [
        of(train, val, names=("1", "0")),
        of(train, val, names=None),
        of(train, rows_of(("c", "1"))),
        of(train, rows_of(("c ", "0"))),
        of(train, None, val),
        of(train[::-1], val),
        of(train + rows_of(("d", "1")), val),
    ]
    assert len({own, *others}) == 8
    assert laid(train, val).about.fingerprint == of(train, val, names=None)
