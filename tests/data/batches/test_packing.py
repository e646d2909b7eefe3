import time

import numpy as np
import pytest
import torch

from lora_lightning.data.batches.columns import EncodedRows
from lora_lightning.data.batches.packing import DocumentBatch, DocumentRows, document_from, first_fit, pack_stream
from lora_lightning.data.language.encoding import Encoded
from lora_lightning.errors import DataError
from tests.models import build

ARCHITECTURES = ("llama", "qwen2", "gemma3", "gpt2")
LENGTHS = (12, 5, 11, 2, 1, 9)


def documents(lengths=LENGTHS, seed=3):
    generator = np.random.default_rng(seed)
    encoded = [Encoded(generator.integers(3, 64, length).tolist(), [True] * length) for length in lengths]
    return [document_from(one) for one in encoded]


def in_columns(kept):
    return EncodedRows({"input_ids": [one.ids for one in kept], "labels": [one.labels for one in kept]})


def packed_batch(**settings):
    rows = DocumentRows(in_columns(documents()), max_length=24)
    return rows, DocumentBatch(0, packed=True, **settings)([rows[index] for index in range(len(rows))])


def largest_leak(model, rows, batch, side="right", **changes):
    """The largest difference between the logits of a packed document and those of the document alone."""
    worst = 0.0
    inputs = {name: value for name, value in batch.items() if name != "labels"} | changes
    with torch.no_grad():
        logits = model(**{"use_cache": False, **inputs}).logits
        for index in range(len(rows)):
            at = 0 if side == "right" else batch["input_ids"].shape[1] - rows.lengths[index]
            for document in rows[index]:
                ids = torch.from_numpy(document.ids.astype(np.int64))[None]
                alone = model(input_ids=ids, use_cache=False).logits[0]
                worst = max(worst, float((logits[index, at : at + ids.shape[1]] - alone).abs().max()))
                at += ids.shape[1]
    return worst


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_do_not_see_each_other(name, attention):
    model = build(name)
    model.set_attn_implementation(attention)
    for side in ("right", "left"):
        rows, batch = packed_batch(side=side)
        assert min(map(len, (rows[index] for index in range(len(rows))))) >= 2
        assert largest_leak(model, rows, batch, side) <= 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_leaks_are_seen(name):
    """The measure above is not blind: what ties documents together shows."""
    model = build(name)
    rows, batch = packed_batch()
    width = batch["input_ids"].shape[1]
    assert largest_leak(model, rows, batch, position_ids=torch.arange(width).expand(len(rows), -1)) > 1e-2
    assert largest_leak(model, rows, batch, attention_mask=torch.ones(len(rows), width, dtype=torch.long)) > 1e-2
    assert largest_leak(model, rows, batch, use_cache=True) > 1e-2


def test_the_sliding_window_counts_within_a_document():
    """Gemma 3's window of 8 tokens lies inside the 12 tokens of the first document, in a row and alone."""
    model = build("gemma3")
    assert model.config.sliding_window < max(LENGTHS)
    rows, batch = packed_batch()
    assert largest_leak(model, rows, batch) <= 1e-5
    model.config.sliding_window, wide = 64, largest_leak(model, rows, batch)
    assert wide <= 1e-5
    with torch.no_grad():
        wide_logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        model.config.sliding_window = 8
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    assert (logits - wide_logits).abs().max() > 1e-3  # control: the window matters here


def test_no_document_is_predicted_from_the_one_before():
    _, batch = packed_batch()
    first = batch["position_ids"] == 0
    assert (batch["labels"][first] == -100).all()
    assert (batch["labels"][~first] == batch["input_ids"][~first]).all()
    assert int((batch["labels"] != -100).sum()) == sum(LENGTHS) - len(LENGTHS)
    assert "attention_mask" not in batch


def test_rows_hold_every_document_once():
    kept = documents()
    rows = DocumentRows(in_columns(kept), max_length=24)
    assert max(rows.lengths) <= 24
    seen = sorted(document.ids.tolist() for index in range(len(rows)) for document in rows[index])
    assert seen == sorted(document.ids.tolist() for document in kept)
    assert (len(rows.documents), sum(rows.lengths)) == (6, 40)
    alone = DocumentRows(in_columns(kept))
    assert [row[0].ids.tolist() for row in map(alone.__getitem__, range(6))] == [one.ids.tolist() for one in kept]
    assert alone.lengths.tolist() == list(LENGTHS)


def test_first_fit_equals_the_plain_search():
    def plain(sizes, capacity):
        bins = []
        for place, size in enumerate(sizes):
            fitting = (one for one in bins if sum(sizes[other] for other in one) + size <= capacity)
            found = next(fitting, None)
            bins.append([place]) if found is None else found.append(place)
        return bins

    for seed in range(5):
        sizes = np.random.default_rng(seed).integers(1, 65, 60).tolist()
        assert first_fit(sizes, 64) == plain(sizes, 64)
    assert first_fit([], 8) == []
    start = time.process_time()
    packs = first_fit(np.random.default_rng(0).integers(1, 513, 20_000).tolist(), 2048)
    assert time.process_time() - start < 10
    assert len(packs) < 20_000 * 257 / 2048 * 1.02


def test_streams_are_packed_as_they_come():
    kept = documents([int(size) for size in np.random.default_rng(1).integers(1, 25, 200)])
    rows = list(pack_stream(iter(kept), 24, open_rows=8))
    assert sorted(one.ids.tolist() for row in rows for one in row) == sorted(one.ids.tolist() for one in kept)
    sizes = [sum(len(one.ids) for one in row) for row in rows]
    assert max(sizes) <= 24
    assert sum(sizes) / (24 * len(rows)) > 0.9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_either_side_changes_nothing(name):
    model = build(name)
    rows = [[one] for one in documents()]
    shown = {}
    for side in ("right", "left"):
        batch = DocumentBatch(0, side)(rows)
        assert ("position_ids" in batch) == (side == "left")
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        shown[side] = logits[batch["attention_mask"].bool()]
        assert (labels[batch["attention_mask"] == 0] == -100).all()
    assert (shown["left"] - shown["right"]).abs().max() <= 1e-5
    assert batch["attention_mask"][1].tolist() == [0] * 7 + [1] * 5
    with torch.no_grad():
        del batch["position_ids"]
        blind = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    # control: absolute positions would be those of the padding; rotary ones are relative
    assert ((blind - shown["right"]).abs().max() > 1e-3) == (name == "gpt2")


def test_batches_without_labels_are_refused():
    masked = document_from(Encoded([5, 6, 7], [False, False, False]))
    with pytest.raises(DataError, match="All labels of a batch of 2 rows are masked"):
        DocumentBatch(0)([[masked], [masked]])
    DocumentBatch(0)([[masked], documents()[:1]])
