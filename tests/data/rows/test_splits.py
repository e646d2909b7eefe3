from collections import Counter

import numpy as np
import pytest

from lora_lightning.data.rows.splits import check_size, count_rows, group_split, stratified_split
from lora_lightning.errors import ConfigError, DataError


def stratified(labels, counts, seed):
    """Split labels by name; the indices as lists."""
    names = list(dict.fromkeys(labels))
    drawn = stratified_split(np.array([names.index(label) for label in labels]), names, counts, seed)
    return {split: rows.tolist() for split, rows in drawn.items()}


def grouped(groups, *settings, seed):
    return {split: rows.tolist() for split, rows in group_split(np.array(groups), *settings, seed=seed).items()}


LABELS = ["a"] * 700 + ["b"] * 250 + ["c"] * 47 + ["d"] * 3


def test_every_class_has_its_share_in_every_split():
    counts = {"train": 800, "val": 100, "test": 50}
    places = stratified(LABELS, counts, seed=1)
    assert list(places) == ["train", "val", "test"]
    assert {split: len(rows) for split, rows in places.items()} == counts
    everything = [place for rows in places.values() for place in rows]
    assert len(set(everything)) == len(everything) == 950
    for split, size in counts.items():
        classes = Counter(LABELS[place] for place in places[split])
        assert classes["d"] == 1  # exactly 3 rows of it for 3 splits
        for name, total in (("a", 700), ("b", 250), ("c", 47)):
            assert abs(classes[name] - total * size / 1000) <= 2
        assert places[split] == sorted(places[split])


def test_split_depends_on_the_seed_alone():
    counts = {"train": 500, "val": 100}
    assert stratified(LABELS, counts, seed=3) == stratified(LABELS, counts, seed=3)
    assert stratified(LABELS, counts, seed=3) != stratified(LABELS, counts, seed=4)


def test_split_does_not_depend_on_which_class_is_numbered_first():
    counts, classes = {"train": 500, "val": 100}, np.array([label != "a" for label in LABELS]).astype(int)
    one = stratified_split(classes, ["a", "b"], counts, seed=3)
    other = stratified_split(1 - classes, ["b", "a"], counts, seed=3)
    swapped = stratified_split(1 - classes, ["a", "b"], counts, seed=3)
    assert all((one[split] == other[split]).all() for split in counts)
    assert not np.array_equal(one["val"], swapped["val"])  # control


@pytest.mark.parametrize("train", [5, 17, 40])
def test_sizes_are_exact_where_classes_are_small(train):
    labels = ["a"] * 3 + ["b"] * 4 + ["c"] * 40
    places = stratified(labels, {"train": train, "val": 3, "test": 4}, seed=0)
    assert [len(rows) for rows in places.values()] == [train, 3, 4]
    assert all({labels[place] for place in rows} == {"a", "b", "c"} for rows in places.values())


def test_what_cannot_be_stratified_is_told():
    with pytest.raises(DataError, match=r"Too rare to be split into train, val, test, .*: 'b' \(2\)\. Leave these"):
        stratified(["a"] * 50 + ["b"] * 2, {"train": 40, "val": 5, "test": 5}, seed=0)
    stratified(["a"] * 50 + ["b"] * 2, {"train": 40, "val": 5}, seed=0)  # control: two splits can
    with pytest.raises(DataError, match=r"val would have 2 rows for 3 classes; ask for at least 3 \(val_size\)"):
        stratified(["a", "b", "c"] * 9, {"train": 20, "val": 2}, seed=0)
    with pytest.raises(DataError, match="and 20 more"):
        stratified([str(index) for index in range(30)], {"train": 20, "val": 2}, seed=0)


def test_sizes_become_numbers_of_rows():
    assert count_rows({"train": None, "val": 0.1, "test": 0.1}, 995) == {"train": 795, "val": 100, "test": 100}
    assert count_rows({"train": 0.5, "val": 3}, 20) == {"train": 10, "val": 3}
    assert count_rows({"train": None, "val": 0, "test": 0.01}, 10) == {"train": 9, "test": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 8, "val": 2, "test": 1}, r"ask for 11 rows \(train 8, val 2, test 1\), but 10 are left"),
        ({"train": None, "val": 10}, r"10 rows \(val 10\) with at least one left for train, but 10 are left"),
        ({"train": 0.7, "val": 0.4}, r"ask for 11 rows"),
    ],
)
def test_more_rows_than_there_are_is_an_error(sizes, message):
    with pytest.raises(DataError, match=message):
        count_rows(sizes, 10)


@pytest.mark.parametrize("size", [-1, 1.0, 1.5, -0.1, True, float("nan"), 8000.0])
def test_sizes_out_of_range(size):
    with pytest.raises(ConfigError, match=r"val_size is .* at least 0"):
        check_size("val_size", size, zero=True)


def test_zero_rows_only_where_they_make_sense():
    for size in (0, None, 1, 0.5):
        check_size("val_size", size, zero=True)
    with pytest.raises(ConfigError, match=r"train_size is 0: .* at least 1"):
        check_size("train_size", 0, zero=False)


def test_groups_are_never_divided():
    groups = [f"g{index % 13}" for index in range(100)]
    places = grouped(groups, {"val": 20, "test": 9}, "train", seed=0)
    sides = {name: {groups[place] for place in those} for name, those in places.items()}
    assert sum(map(len, sides.values())) == 13
    assert sorted(place for those in places.values() for place in those) == list(range(100))
    assert 9 > 20 - len(places["val"]) >= 0  # as near as whole groups come
    assert places == grouped(groups, {"val": 20, "test": 9}, "train", seed=0)
    assert places != grouped(groups, {"val": 20, "test": 9}, "train", seed=1)
    some = grouped(groups, {"train": 30, "val": 20}, "train", seed=0)
    assert len(some["train"]) <= 30
    with pytest.raises(DataError, match="No rows can be had for test"):
        grouped(["a"] * 10, {"test": 3}, "train", seed=0)
