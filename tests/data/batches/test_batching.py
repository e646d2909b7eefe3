import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lora_lightning.data.batches.batching import LengthGroupedSampler, PadToLongest, even_batch_size
from lora_lightning.data.batches.columns import EncodedRows

LENGTHS = np.random.default_rng(0).integers(3, 90, size=1003).tolist()


def sampler(lengths=LENGTHS, batch_size=8, epoch=0, **settings):
    made = LengthGroupedSampler(lengths, batch_size, **settings)
    made.set_epoch(epoch)
    return made


def cut(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(order, size):
    return sum(len(batch) * max(LENGTHS[place] for place in batch) for batch in cut(order, size))


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_exactly_once(shuffle, group_by_length):
    order = list(sampler(shuffle=shuffle, group_by_length=group_by_length))
    assert sorted(order) == list(range(len(LENGTHS)))


def test_order_depends_on_seed_and_epoch_alone():
    orders = {(seed, epoch): list(sampler(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert orders[1, 2] == list(sampler(seed=1, epoch=2))
    assert len({tuple(order) for order in orders.values()}) == 9  # (0, 1) and (1, 0) differ as well
    again = sampler(seed=1)
    list(again)
    again.set_epoch(2)
    assert list(again) == orders[1, 2]


def test_grouping_pads_far_less_and_still_mixes():
    grouped, free = list(sampler()), list(sampler(group_by_length=False))
    assert padded(grouped, 8) < 1.15 * sum(LENGTHS)
    assert padded(free, 8) > 1.5 * sum(LENGTHS)  # control
    longest = [max(LENGTHS[place] for place in batch) for batch in cut(grouped, 8)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
    partners = [{frozenset(batch) for batch in cut(list(sampler(epoch=epoch)), 8)} for epoch in (0, 1)]
    assert len(partners[0] & partners[1]) < 5
    assert len(cut(grouped, 8)[-1]) == 1003 % 8


def test_without_shuffling_the_longest_come_first():
    order = list(sampler(shuffle=False, epoch=3))
    assert [LENGTHS[place] for place in order] == sorted(LENGTHS, reverse=True)
    assert list(sampler(shuffle=False, group_by_length=False)) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 63, 64, 65, 97])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_rows_and_stay_in_step(num_rows, num_replicas, shuffle):
    size = 8
    ranks = [
        sampler(LENGTHS[:num_rows], size, epoch=1, shuffle=shuffle, num_replicas=num_replicas, rank=rank)
        for rank in range(num_replicas)
    ]
    orders = [list(one) for one in ranks]
    assert [len(order) for order in orders] == [len(one) for one in ranks]
    assert len({len(cut(order, size)) for order in orders}) == 1
    together = list(itertools.chain(*orders))
    assert set(together) == set(range(num_rows))
    repeated = len(together) - num_rows
    must_repeat = num_rows % num_replicas != 0 and (num_rows // num_replicas) % size == 0
    assert repeated == (num_replicas - num_rows % num_replicas if must_repeat else 0)


def test_ranks_see_together_what_one_process_sees_with_a_larger_batch():
    one = cut(list(sampler(batch_size=16, epoch=2)), 16)
    two = [cut(list(sampler(batch_size=8, epoch=2, num_replicas=2, rank=rank)), 8) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]
    other = [cut(list(sampler(batch_size=8, epoch=3, num_replicas=2, rank=rank)), 8) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*other, strict=True)] != [sorted(batch) for batch in one]


def test_even_batch_size_repeats_nothing_where_it_can():
    assert even_batch_size(65, 2, 32) == 31
    assert even_batch_size(64, 2, 32) == 32
    assert even_batch_size(65, 1, 32) == 32
    assert even_batch_size(1, 2, 32) == 32  # impossible
    for num_rows in range(70, 200):
        size = even_batch_size(num_rows, 4, 16)
        assert sampler(LENGTHS[:num_rows], size, num_replicas=4, rank=0).num_repeated == 0


def test_padding_goes_to_the_longest_on_the_side_asked():
    items = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1},
        {"input_ids": [8], "attention_mask": [1], "labels": 0},
    ]
    batch = PadToLongest({"input_ids": 9})(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    assert PadToLongest({"input_ids": 9}, "left")(items)["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]


@pytest.mark.parametrize(("side", "mask"), [("right", [[1, 1, 1], [1, 0, 0]]), ("left", [[1, 1, 1], [0, 0, 1]])])
def test_masks_and_labels_of_tokens_are_padded_as_their_tokens(side, mask):
    columns = {"input_ids": ([5, 6, 7], [8]), "labels": ([1, 2, 3], [4])}
    items = [{name: np.array(both[row], np.int32) for name, both in columns.items()} for row in range(2)]
    batch = PadToLongest({"input_ids": 9}, side)(items)
    assert batch["attention_mask"].tolist() == mask
    real = batch["attention_mask"].bool()
    assert batch["labels"][real].tolist() == [1, 2, 3, 4]
    assert batch["labels"][~real].tolist() == [-100, -100]
    assert batch["input_ids"][~real].tolist() == [9, 9]
    assert "attention_mask" not in PadToLongest()([{"labels": 1}])


def test_numbers_keep_their_kind():
    items = [{"labels": np.array([0.5, 1], np.float32), "index": np.int32(1)}, {"labels": [2.0, 3], "index": 2}]
    batch = PadToLongest()(items)
    assert batch["labels"].dtype is torch.float32
    assert batch["labels"].tolist() == [[0.5, 1], [2, 3]]
    assert batch["index"].dtype is torch.long
    assert PadToLongest()([{"labels": 0.5}, {"labels": 2.0}])["labels"].tolist() == [0.5, 2]


def test_loader_cuts_the_order_into_batches_and_keeps_labels_with_texts():
    ids = [[100 + index] * (index % 5 + 1) for index in range(30)]
    rows = EncodedRows({"input_ids": ids, "labels": list(range(30))})
    order = sampler(rows.lengths, 4)
    batches = list(DataLoader(rows, batch_size=4, sampler=order, collate_fn=PadToLongest()))
    assert [batch["labels"].tolist() for batch in batches] == cut(list(order), 4)
    assert all((batch["input_ids"][:, 0] == 100 + batch["labels"]).all() for batch in batches)
    assert all((batch["attention_mask"] == (batch["input_ids"] != 0)).all() for batch in batches)
    assert "labels" not in EncodedRows({"input_ids": ids})[0]
