"""Properties that hold for every input that hypothesis draws; each beside a change for which it must not hold."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import nn

import lora_lightning.methods  # noqa: F401 - the classes that a config may name
from lora_lightning import LoRA, attach, merge
from lora_lightning.adapters import Method, adapter_state_dict, folded_state_dict
from lora_lightning.checkpoint.manifest import class_config
from lora_lightning.config.strict_yaml import PARSER_MODE, load_text, register
from lora_lightning.data.batches.batching import LengthGroupedSampler, PadToLongest, even_batch_size
from lora_lightning.data.batches.columns import EncodedRows
from lora_lightning.data.batches.packing import (
    UNSUPERVISED,
    Document,
    DocumentBatch,
    DocumentRows,
    first_fit,
    pack_stream,
)
from lora_lightning.methods import DoRA
from lora_lightning.optim import Optim
from lora_lightning.peft_format.decode import from_peft
from lora_lightning.peft_format.encode import to_peft
from lora_lightning.tasks.settings import methods_from
from tests.models import perturb

# The same cases on every machine, and no time limit for a machine that is busy.
quick = settings(max_examples=25, derandomize=True, deadline=None, database=None)

names = st.from_regex(r"[a-z]{1,6}(\.[a-z_]{1,6})?", fullmatch=True)
rates = st.floats(1e-8, 10, allow_nan=False)


# Configs: what is dumped reads back as what was said.


@st.composite
def low_rank_methods(draw):
    return draw(st.sampled_from([LoRA, DoRA]))(
        r=draw(st.integers(1, 64)),
        alpha=draw(st.floats(0.01, 1e4)),
        dropout=draw(st.floats(0, 0.99)),
        scaling=draw(st.sampled_from(["standard", "rslora", "alpha"])),
        target_modules=draw(st.one_of(st.none(), st.just("all-linear"), st.lists(names, min_size=1, max_size=3))),
        rank_pattern=draw(st.one_of(st.none(), st.dictionaries(names, st.integers(1, 9), min_size=1, max_size=2))),
        modules_to_save=draw(st.one_of(st.none(), st.lists(names, min_size=1, max_size=2))),
        layers_to_transform=draw(st.one_of(st.none(), st.lists(st.integers(0, 40), min_size=1, max_size=3))),
    )


optims = st.builds(
    Optim,
    lr=rates,
    head_lr=st.none() | rates,
    lora_plus_ratio=st.none() | st.floats(1, 100),
    weight_decay=st.floats(0, 1),
    optimizer=st.sampled_from(["AdamW", {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}]),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 1) | st.integers(2, 100).map(float),
)


@pytest.fixture(scope="module")
def parser():
    register()
    parser = ArgumentParser(exit_on_error=False, parser_mode=PARSER_MODE)
    parser.add_argument("--method", type=Method)
    parser.add_argument("--optim", type=Optim)
    return parser


@quick
@given(method=low_rank_methods(), optim=optims)
def test_a_config_reads_back_as_it_was_dumped(parser, method, optim):
    text = yaml.safe_dump({"method": class_config(method), "optim": {**vars(optim)}})
    first = parser.parse_string(text)
    again = parser.parse_string(parser.dump(first))
    assert again == first
    built = parser.instantiate(again)
    assert (built.method, built.optim) == (method, optim)
    assert methods_from(class_config(method)) == (method,)
    first.method.init_args.r += 1
    assert again != first


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("aé: #-'\"\n1e")
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)


@quick
@given(values)
def test_strict_yaml_reads_what_yaml_writes(value):
    assert load_text(yaml.safe_dump({"a": value}, allow_unicode=True)) == {"a": value}


# PEFT's keys: there and back.


class Zoo(nn.Module):
    """One host of each kind, below paths of several depths."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 5), "v": nn.Linear(6, 4)}) for _ in range(2))
        self.conv = nn.Conv1d(6, 3, 2)
        self.head = nn.Linear(6, 2)


HOSTS = ["embed", "blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v", "conv"]


@quick
@given(
    hosts=st.lists(st.sampled_from(HOSTS), min_size=1, unique=True),
    kind=st.sampled_from([LoRA, DoRA]),
    rank=st.integers(1, 3),
    saves=st.booleans(),
    seed=st.integers(0, 99),
)
def test_peft_keys_lead_back(hosts, kind, rank, saves, seed):
    assume(kind is LoRA or not {"embed", "conv"} & set(hosts))
    model = Zoo()
    ranks = {hosts[0]: 2} if rank != 2 else None
    attach(model, kind(r=rank, target_modules=hosts, rank_pattern=ranks, modules_to_save=["head"] if saves else None))
    perturb(model, seed)
    state = folded_state_dict(model)
    peft = to_peft(model, state)
    back = from_peft(peft.config, peft.state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name].view(state[name].shape), state[name]) for name in state)
    assert len(peft.state) == len(state)
    assert all(name.startswith("base_model.model.") for name in peft.state)
    lost = dict(list(peft.state.items())[1:])
    assert from_peft(peft.config, lost).keys() != state.keys()


# Merging.


@quick
@given(
    r=st.integers(1, 6),
    alpha=st.floats(0.1, 64),
    scaling=st.sampled_from(["standard", "rslora", "alpha"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    rows=st.integers(6, 17),
    columns=st.integers(6, 17),
    seed=st.integers(0, 99),
)
def test_a_merged_weight_is_the_formula_rounded_once(r, alpha, scaling, dtype, rows, columns, seed):
    torch.manual_seed(seed)
    host = nn.Linear(columns, rows).to(dtype)
    model, weight = nn.Sequential(host), host.weight.detach().double()
    attach(model, LoRA(r=r, alpha=alpha, scaling=scaling, target_modules=["0"]))
    perturb(model, seed)
    state = adapter_state_dict(model)
    a, b = state["0.lora_A"].double(), state["0.lora_B"].double()
    scale = {"standard": alpha / r, "rslora": alpha / math.sqrt(r), "alpha": alpha}[scaling]
    expected = weight + scale * b @ a
    inputs = torch.randn(3, columns, dtype=torch.float64)
    adapted = model(inputs.to(dtype)).detach().double()
    merge(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype is dtype
    # Half a unit in the last place of the largest weight, and what float32 arithmetic adds.
    bound = float(expected.abs().max()) * (torch.finfo(dtype).eps / 2 + 1e-6)
    merged = model[0].weight.detach().double()
    assert float((merged - expected).abs().max()) <= bound
    assert float((merged - (weight + 1.5 * scale * b @ a)).abs().max()) > bound
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(model(inputs.to(dtype)).double(), adapted, rtol=1e-4, atol=1e-4)


@quick
@given(factor=st.floats(0.1, 8), r=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_merged_update_is_linear_in_alpha(factor, r, seed):
    def update(alpha):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(7, 5).double())
        before = model[0].weight.detach().clone()
        attach(model, LoRA(r=r, alpha=alpha, target_modules=["0"]))
        perturb(model, seed)
        merge(model)
        return model[0].weight.detach() - before

    torch.testing.assert_close(update(4 * factor), factor * update(4.0), rtol=1e-6, atol=1e-9)


# Batches and packs.

rows_of_tokens = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6)


@quick
@given(rows=rows_of_tokens, side=st.sampled_from(["left", "right"]), pad=st.integers(100, 110))
def test_a_batch_holds_every_token_and_pads_one_side(rows, side, pad):
    items = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": 1} for row in rows]
    batch = PadToLongest({"input_ids": pad}, side)(items)
    assert batch["input_ids"].shape == (len(rows), max(map(len, rows)))
    assert batch["labels"].tolist() == [1] * len(rows)
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        kept = slice(len(ids) - len(row), None) if side == "left" else slice(len(row))
        assert ids[kept].tolist() == row
        assert ids[mask == 0].tolist() == [pad] * (len(ids) - len(row))
        assert mask[kept].tolist() == [1] * len(row)


@st.composite
def documents(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    found = []
    for number, size in enumerate(sizes, start=1):
        ids = np.full(size, number, np.int32)
        labels = np.where(np.arange(size) % 2 == 1, ids, UNSUPERVISED).astype(np.int32)
        found.append(Document(ids, labels))
    return found


def kept(documents):
    return EncodedRows({"input_ids": [one.ids for one in documents], "labels": [one.labels for one in documents]})


@quick
@given(documents=documents(), room=st.integers(9, 20), seed=st.integers(0, 9), open_rows=st.integers(1, 4))
def test_packing_loses_and_cuts_nothing(documents, room, seed, open_rows):
    packed = DocumentRows(kept(documents), max_length=room, seed=seed)
    for rows in (list(map(packed.__getitem__, range(len(packed)))), list(pack_stream(documents, room, open_rows))):
        whole = Counter(document.ids.tobytes() for row in rows for document in row)
        assert whole == Counter(document.ids.tobytes() for document in documents)
        assert all(sum(len(document.ids) for document in row) <= room for row in rows)
    assert sum(packed.lengths) == sum(len(document.ids) for document in documents)
    sizes = [len(document.ids) for document in documents]
    bins = [sum(sizes[place] for place in one) for one in first_fit(sizes, room)]
    assert all(first + second > room for first, second in pairwise(bins))


@quick
@given(documents=documents(), room=st.integers(9, 20), side=st.sampled_from(["left", "right"]))
def test_a_packed_batch_keeps_documents_apart(documents, room, side):
    assume(any((document.labels != UNSUPERVISED).any() for document in documents))
    rows = DocumentRows(kept(documents), max_length=room)
    batch = DocumentBatch(0, side, packed=True)([rows[index] for index in range(len(rows))])
    real = batch["input_ids"] != 0
    assert int(real.sum()) == sum(len(document.ids) for document in documents)
    assert int((batch["labels"] != UNSUPERVISED).sum()) == sum(
        int((document.labels != UNSUPERVISED).sum()) for document in documents
    )
    # Every document starts at 0 and counts on; padding is a document of one token each.
    assert int((batch["position_ids"][real] == 0).sum()) == len(documents)
    assert batch["position_ids"][~real].eq(0).all()
    follows = (batch["position_ids"][:, 1:] - batch["position_ids"][:, :-1] == 1) & real[:, 1:]
    assert batch["input_ids"][:, 1:][follows].eq(batch["input_ids"][:, :-1][follows]).all()


@quick
@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=60),
    batch_size=st.integers(1, 7),
    ranks=st.integers(1, 4),
    epoch=st.integers(0, 3),
    grouped=st.booleans(),
    shuffle=st.booleans(),
)
def test_ranks_together_see_every_row_in_equally_many_batches(lengths, batch_size, ranks, epoch, grouped, shuffle):
    samplers = [
        LengthGroupedSampler(
            lengths, batch_size, shuffle=shuffle, group_by_length=grouped, num_replicas=ranks, rank=rank
        )
        for rank in range(ranks)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    seen = [list(sampler) for sampler in samplers]
    counts = Counter(place for rank in seen for place in rank)
    assert set(counts) == set(range(len(lengths)))
    assert counts.total() - len(lengths) == samplers[0].num_repeated < ranks
    assert len({math.ceil(len(rank) / batch_size) for rank in seen}) == 1
    assert [len(rank) for rank in seen] == [len(sampler) for sampler in samplers]
    even = even_batch_size(len(lengths), ranks, batch_size)
    assert 1 <= even <= batch_size
