"""Samplers and streams that start amid an epoch, also on another number of ranks: every row comes once."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.data.batches.batching import LengthGroupedSampler
from lora_lightning.data.batches.streaming import StreamedRows, StreamLoader
from lora_lightning.data.language.encoding import Encoded, EncodedSample
from lora_lightning.resume import Layout, Position

LENGTHS = np.random.default_rng(0).integers(3, 90, size=203).tolist()
LAYOUTS = st.builds(Layout, st.integers(1, 4), st.integers(1, 6), st.just(1))


def ranks_of(num_rows, layout, position):
    samplers = [
        LengthGroupedSampler(LENGTHS[:num_rows], layout.batch_size, num_replicas=layout.num_replicas, rank=rank)
        for rank in range(layout.num_replicas)
    ]
    for one in samplers:
        one.seek(position)
    return samplers


def batches_of(sampler):
    order = list(sampler)
    assert len(order) == len(sampler)
    return [order[start : start + sampler.batch_size] for start in range(0, len(order), sampler.batch_size)]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(5, 203), st.lists(LAYOUTS, min_size=1, max_size=3), st.data())
def test_ranks_that_change_amid_an_epoch_take_every_row_once(num_rows, layouts, data):
    position, seen = Position(2), Counter()
    for number, layout in enumerate(layouts):
        by_rank = [batches_of(sampler) for sampler in ranks_of(num_rows, layout, position)]
        assert len({len(batches) for batches in by_rank}) == 1  # no rank waits for another
        is_last = number == len(layouts) - 1
        num = len(by_rank[0]) if is_last else data.draw(st.integers(0, max(len(by_rank[0]) - 1, 0)))
        for batches in by_rank:
            seen.update(place for batch in batches[:num] for place in batch)
        position = position.after(num, layout)
    assert set(seen) == set(range(num_rows))
    assert seen.total() - num_rows < layouts[-1].num_replicas  # only those that keep the ranks in step


@pytest.mark.parametrize("layout", [Layout(1, 4), Layout(3, 5), Layout(2, 8)])
def test_the_same_ranks_go_on_with_the_same_batches(layout):
    whole = [batches_of(sampler) for sampler in ranks_of(203, layout, Position(1))]
    rest = [batches_of(sampler) for sampler in ranks_of(203, layout, Position(1).after(7, layout))]
    assert rest == [batches[7:] for batches in whole]
    assert rest != [batches_of(one)[7:] for one in ranks_of(203, layout, Position(2))]
    one = ranks_of(203, layout, Position(1).after(7, layout))[0]
    one.set_epoch(1)
    assert batches_of(one) == rest[0]
    one.set_epoch(2)
    assert len(batches_of(one)) == len(whole[0])


class Letters:
    """Encodes a text as its letters, all learnt."""

    max_length = 16

    def encode(self, sample):
        ids = [ord(letter) for letter in sample.text]
        return EncodedSample((Encoded(ids, [True] * len(ids)),))


@pytest.fixture
def stream_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": chr(200 + number) * (2 + number % 7)}) + "\n" for number in range(60)))
    return str(path)


def letters_of(batch):
    return [int(document.ids[0]) for row in batch for document in row]


def stream(source, layout, position, rank=0, *, packing=False):
    rows = StreamedRows(
        source, Letters(), packing=packing, buffer=7, seed=1, num_replicas=layout.num_replicas, rank=rank
    )
    workers = layout.num_workers if layout.num_workers > 1 else 0
    loader = StreamLoader(rows, layout.batch_size, num_workers=workers, collate_fn=letters_of)
    loader.seek(position)
    return loader


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_stream_starts_at_any_batch(stream_file, num_workers, packing):
    layout = Layout(1, 4, num_workers)
    loader = stream(stream_file, layout, Position(3), packing=packing)
    whole, following = list(loader), list(loader)
    again = stream(stream_file, layout, Position(3).after(3, layout), packing=packing)
    assert list(again) == whole[3:]
    assert list(again) == following  # the epoch after it is whole
    assert whole[3:] != following[3:]


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data(), packing=st.booleans())
def test_a_stream_that_is_dealt_anew_gives_what_is_left_once(data, packing, tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": chr(200 + number) * (2 + number % 7)}) + "\n" for number in range(60)))
    position, seen, dropped = Position(1), Counter(), 0
    layouts = data.draw(st.lists(LAYOUTS, min_size=2, max_size=3))
    for number, layout in enumerate(layouts):
        by_rank = [list(stream(str(path), layout, position, rank, packing=packing)) for rank in range(layout[0])]
        assert len({len(batches) for batches in by_rank}) == 1
        is_last = number == len(layouts) - 1
        num = len(by_rank[0]) if is_last else data.draw(st.integers(0, max(len(by_rank[0]) - 1, 0)))
        seen.update(itertools.chain(*(batch for batches in by_rank for batch in batches[:num])))
        dropped += layout.num_replicas - 1
        position = position.after(num, layout)
    assert max(seen.values()) == 1
    rows_dropped = 60 - len(seen)
    assert rows_dropped <= dropped * (8 if packing else 1)  # a packed row holds up to eight of these texts


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_former_workers_are_followed_too(stream_file):
    before, now = Layout(2, 3, 2), Layout(1, 4)
    streams = [list(stream(stream_file, before, Position(0), rank)) for rank in range(2)]
    rest = stream(stream_file, now, Position(0).after(4, before))
    seen = Counter(itertools.chain(*(batch for batches in streams for batch in batches[:4]), *rest))
    assert max(seen.values()) == 1
    assert len(seen) == 60
