"""Labelled texts in training: the order of epochs, resumed runs, checkpoints, several processes."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from lora_lightning.data import TextClassificationData
from tests.data.conftest import labelled
from tests.data.toys import Model, trainer


@pytest.mark.filterwarnings("ignore:Total length of `list`")  # Lightning's, for val_size 0
def test_every_epoch_has_its_own_order_and_a_rerun_the_same(build_texts, tokenizer_folder):
    def run(**settings):
        model, data = Model(tokenizer_folder), build_texts(stage="fit", val_size=0, **settings)
        data.tokenizer_name = None  # from here on, the backbone's own
        trainer(max_epochs=3).fit(model, data)
        return model.seen

    first = run()
    assert first == run()
    assert first != run(seed=5)
    assert run() == run(num_workers=2)
    epochs = [first["train", epoch] for epoch in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert len({str(sorted(itertools.chain(*epoch))) for epoch in epochs}) == 1


def test_resumed_run_goes_on_with_the_next_epochs_order(build_texts, tokenizer_folder, tmp_path):
    whole = Model(tokenizer_folder)
    trainer(max_epochs=3).fit(whole, build_texts())
    half, rest = Model(tokenizer_folder), Model(tokenizer_folder)
    runner = trainer(max_epochs=1)
    runner.fit(half, build_texts())
    runner.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_epochs=3).fit(rest, build_texts(), ckpt_path=tmp_path / "half.ckpt")
    assert {key: rest.seen[key] for key in rest.seen if key[0] == "train"} == {
        ("train", epoch): whole.seen["train", epoch] for epoch in (1, 2)
    }


def test_checkpoints_keep_the_settings_as_plain_types(build_texts, tokenizer_folder, tmp_path):
    data = build_texts(where=["label != 'maybe'"])
    runner = trainer(max_epochs=1)
    runner.fit(Model(tokenizer_folder), data)
    runner.save_checkpoint(tmp_path / "run.ckpt")
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert kept["where"] == ["label != 'maybe'"]
    assert (kept["tokenizer"], kept["batch_size"], kept["val_size"]) == (tokenizer_folder, 8, None)


@pytest.mark.slow
def test_two_processes_share_the_rows(write, tokenizer_folder, tmp_path):
    path = write("train.csv", labelled(100))
    script = Path(__file__).with_name("ranks_script.py")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), path, tokenizer_folder, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    data = TextClassificationData(path, val_size=17, test_size=11, batch_size=4, tokenizer=tokenizer_folder)
    data.setup()
    for split, epochs in {"train": (0, 1), "val": (0, 1)}.items():
        everything = Counter(ids[1] for ids in data._encoded[split].columns["input_ids"])
        for epoch in epochs:
            batches = [[ids for at, ids in rank[split] if at == epoch] for rank in ranks]
            assert len(batches[0]) == len(batches[1])
            assert Counter(itertools.chain(*batches[0], *batches[1])) == everything
    # One process read and encoded; the other one found what it wrote.
    assert sum(rank["read"] for rank in ranks) == 100
    assert sum(rank["encoded"] for rank in ranks) == 100
    orders = [[ids for at, ids in ranks[0]["train"] if at == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    predicted = [ids for rank in ranks for _, ids in rank["predict"]]
    assert Counter(itertools.chain(*predicted)) == Counter(
        ids[1] for ids in data._encoded["predict"].columns["input_ids"]
    )
