"""Conversations that are read while training."""

import itertools
import json
import warnings

import pytest

from lora_lightning.data.batches.streaming import StreamedRows
from lora_lightning.errors import DataError
from tests.data.instruction_runs import PAIRS, Model, everything, fit


def test_a_stream_gives_the_same_samples(build):
    whole = everything(build().train_dataloader())
    for settings in ({}, {"num_workers": 2}, {"shuffle_buffer": 1}, {"packing": True, "max_length": 64}):
        data = build(streaming=True, **settings)
        batches = list(data.train_dataloader())
        assert "position_ids" in batches[0] or everything(batches) == whole
        assert sorted(itertools.chain(*everything(batches))) == sorted(itertools.chain(*whole))
    assert data.counts["rows_read"] == 0
    assert len(data.fingerprint) == 64
    loader = build(streaming=True).train_dataloader()
    assert [one["input_ids"].tolist() for one in loader] != [one["input_ids"].tolist() for one in loader]


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_and_workers_share_a_stream(build, monkeypatch, packing):
    data = build(PAIRS[:39], streaming=True, packing=packing, max_length=64)

    def rows(rank, worker):
        info = type("Info", (), {"id": worker, "num_workers": 2})
        monkeypatch.setattr("lora_lightning.data.batches.streaming.get_worker_info", lambda: info)
        stream = StreamedRows(**{**vars(data._stream()), "num_replicas": 2, "rank": rank})
        return [tuple(one.ids.tolist() for one in row) for row in stream]

    parts = {(rank, worker): rows(rank, worker) for rank in (0, 1) for worker in (0, 1)}
    for worker in (0, 1):
        assert len(parts[0, worker]) == len(parts[1, worker])  # no rank waits for the other
    seen = [str(row) for part in parts.values() for row in part]
    assert len(set(seen)) == len(seen)
    documents = sum(len(row) for part in parts.values() for row in part)
    assert 39 - documents <= (2 if not packing else 16)


def test_streams_tell_what_they_lose(build):
    data = build([*PAIRS[:3], {"prompt": "q" * 30, "completion": "b"}], streaming=True, max_length=25)
    with pytest.warns(
        UserWarning, match=r"1 of 4 train rows of .* longer than 25 tokens and were cut; 1 rows were left"
    ):
        assert len(everything(data.train_dataloader())) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(build(PAIRS[:3], streaming=True).train_dataloader())  # control
    with pytest.raises(DataError, match="nothing can be learnt from any of 1 rows"):
        build([{"prompt": "q" * 30, "completion": "b"}], streaming=True, max_length=10)


def test_mistakes_in_workers_are_told_in_one_sentence(build):
    data = build([*PAIRS * 3, "{broken"], streaming=True, num_workers=1, bad_rows="refuse")
    with pytest.raises(DataError, match=r"^\S+train\.jsonl, line 121: this is not valid JSON") as caught:
        list(data.train_dataloader())
    assert "\n" not in str(caught.value)


def rows_seen(data):
    return sum(len(batch["input_ids"]) for batch in data.train_dataloader())


def test_streams_leave_broken_rows_out(build):
    records = [*PAIRS, "{broken", {"messages": []}, *PAIRS]
    with (
        pytest.warns(UserWarning, match=r"A broken row is left out: \S+train\.jsonl, line 41: this is not valid JSON"),
        pytest.warns(
            UserWarning, match=r"^2 broken rows are left out; the first: \S+train\.jsonl, line 41: this is no"
        ),
    ):
        seen = rows_seen(build(records, streaming=True, shuffle_buffer=1))
    assert seen == 80
    with pytest.raises(DataError, match="line 41"):  # control
        build(records, streaming=True, bad_rows="refuse")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_stream_loses_is_told_once_a_run_and_written_beside_it(build, tmp_path, num_workers):
    records = [*PAIRS[:9], "{broken", {"messages": []}, {"prompt": "p", "completion": "b" * 99, "topic": "x"}]
    settings = {"streaming": True, "max_length": 60, "too_long": "split", "num_workers": num_workers}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(build(records, **settings), Model(), default_root_dir=tmp_path, max_epochs=3)
    messages = [str(one.message) for one in told]
    assert sum("ignored fields: topic (1 rows)" in one for one in messages) == 1
    assert sum("1 of 11 train rows of" in one and "and were split" in one for one in messages) == 1
    written = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert sum(f"2 broken rows are left out; the first: {written[0]['reason']}" in one for one in messages) == 1
    assert sorted(one["text"].strip() for one in written) == ['{"messages": []}', "{broken"]


@pytest.mark.filterwarnings("ignore:Total length of `list`", "ignore:A broken row is left out")
def test_a_stream_that_is_broken_off_writes_its_bad_rows(build, tmp_path):
    data = build(["{broken", *PAIRS], streaming=True, shuffle_buffer=1)
    with pytest.warns(UserWarning, match=r"1 broken rows are left out; .* They are written to .*bad_rows\.jsonl"):
        fit(data, Model(), default_root_dir=tmp_path, max_epochs=-1, max_steps=2)
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:A broken row is left out")
@pytest.mark.parametrize(
    ("records", "message"),
    [
        (["{broken"] * 9, "no row can be used; the first broken one: .*line 1: this is not valid JSON"),
        ([{"messages": [{"role": "boss", "content": "x"}]}] * 9, "no row can be used; .* the role 'boss' is unknown"),
        ([{"prompt": "a", "completion": " "}] * 9, "nothing can be learnt from any of 9 rows"),
    ],
)
def test_a_stream_of_which_nothing_is_left_is_refused(build, records, message):
    """A run over it would go through empty epochs for ever."""
    with pytest.raises(DataError, match=message):
        build(records, streaming=True, template="chatml")
    build([*records, *PAIRS], streaming=True, template="chatml")  # control
