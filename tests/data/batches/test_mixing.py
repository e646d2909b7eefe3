"""Rows drawn from several sources by weight."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lora_lightning.data.batches.batching import LengthGroupedSampler
from lora_lightning.data.batches.mixing import Mixture, interleave, quotas

PARTS = np.repeat([0, 1], [30, 70])
LENGTHS = np.random.default_rng(1).integers(2, 40, size=100).tolist()


def epoch_of(epoch, weights, *, rank=0, num_replicas=1, group_by_length=True):
    mixture = Mixture(PARTS, weights) if weights else None
    sampler = LengthGroupedSampler(
        LENGTHS,
        8 // num_replicas,
        seed=3,
        group_by_length=group_by_length,
        num_replicas=num_replicas,
        rank=rank,
        mixture=mixture,
    )
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_each_source_has_its_share(group_by_length):
    drawn = Counter(epoch_of(0, [3, 1], group_by_length=group_by_length))
    of_first = {row: count for row, count in drawn.items() if PARTS[row] == 0}
    of_second = {row: count for row, count in drawn.items() if PARTS[row] == 1}
    assert (sum(of_first.values()), sum(of_second.values())) == (75, 25)
    assert set(of_first) == set(range(30))
    assert set(of_first.values()) == {2, 3}  # 75 of 30 rows
    assert set(of_second.values()) == {1}  # 25 of 70 rows
    plain = Counter(epoch_of(0, None, group_by_length=group_by_length))
    assert set(plain.values()) == {1}
    assert len(plain) == 100


def test_weights_in_proportion_of_the_rows_take_each_row_once():
    assert sorted(epoch_of(0, [30, 70])) == list(range(100))


def test_every_epoch_draws_other_rows_and_the_same_epoch_the_same():
    assert epoch_of(1, [3, 1]) == epoch_of(1, [3, 1])
    of_second = [{row for row in epoch_of(epoch, [3, 1]) if PARTS[row] == 1} for epoch in range(8)]
    assert of_second[0] != of_second[1]
    assert len(set.union(*of_second)) > 60  # 25 each time


def test_ranks_together_see_what_one_process_sees():
    alone = epoch_of(2, [3, 1])
    by_rank = [epoch_of(2, [3, 1], rank=rank, num_replicas=2) for rank in range(2)]
    together = [row for pair in zip(*by_rank, strict=True) for row in pair]
    assert together == alone
    assert by_rank[0] != by_rank[1]


def test_sources_alternate_within_the_epoch():
    order = [int(PARTS[row]) for row in epoch_of(0, [1, 1], group_by_length=False)]
    halves = [Counter(order[:50])[0], Counter(order[50:])[0]]
    assert min(halves) > 15  # 25 are expected in each half


@pytest.mark.parametrize("total", [1, 7, 100, 12345])
def test_quotas_add_up(total):
    shares = [0.31, 0.07, 0.5, 0.12]
    parts = quotas(shares, total)
    assert sum(parts) == total
    assert all(abs(part - share * total) < 1 for part, share in zip(parts, shares, strict=True))


def streams(sizes, log=None):
    def begin(part):
        def start(is_first):
            if log is not None:
                log.append((part, is_first))
            return ((part, number) for number in range(sizes[part]))

        return start

    return [begin(part) for part in range(len(sizes))]


def test_streams_are_drawn_by_weight_until_each_was_read():
    begun = []
    items = list(interleave(streams([300, 20], begun), [0.6, 0.4], np.random.default_rng(5)))
    of_first = [number for part, number in items if part == 0]
    of_second = [number for part, number in items if part == 1]
    assert of_first == list(range(300))  # in the order of the file
    assert of_second == [number % 20 for number in range(len(of_second))]
    expected = 300 * 0.4 / 0.6
    assert abs(len(of_second) - expected) < 4 * np.sqrt(300 * 0.4) / 0.6
    assert begun[:2] == [(0, True), (1, True)]
    assert (1, False) in begun[2:]
    other = list(interleave(streams([300, 20]), [0.6, 0.4], np.random.default_rng(6)))
    assert items == list(interleave(streams([300, 20]), [0.6, 0.4], np.random.default_rng(5)))
    assert items != other


def test_a_stream_without_rows_does_not_hold_up_the_others():
    items = list(interleave(streams([0, 5]), [9, 1], np.random.default_rng(0)))
    assert items == [(1, number) for number in range(5)]
    assert list(interleave(streams([0, 0]), [1, 1], np.random.default_rng(0))) == []


def test_one_stream_is_read_once_in_order():
    items = itertools.islice(interleave(streams([2000]), [1.0], np.random.default_rng(0)), 3000)
    assert list(items) == [(0, number) for number in range(2000)]
