"""A base sharded over two gloo ranks trains as in one process, and its checkpoints are those of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lora_lightning import attach, load_adapter
from lora_lightning.adapters import adapter_state_dict
from lora_lightning.callbacks.adapter_checkpoint import writes_folders
from lora_lightning.checkpoint import read_adapter_folder
from lora_lightning.errors import ConfigError
from lora_lightning.strategies import fsdp2
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.strategies import sharded_runs
from tests.tasks.toys import Tagger

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`", "ignore:The dirpath has changed"),
]
EXACT = [name for name in sharded_runs.TASKS if name not in ("half", "eva")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found, and the folder that they wrote into; started from the same script as by a user."""
    folder = tmp_path_factory.mktemp("ranks")
    # A seed that another test left there would be drawn from on every rank.
    variables = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    variables |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    script = [sys.executable, "-m", "tests.strategies.sharded_runs", str(folder)]
    done = subprocess.run(script, env=variables, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(sharded_runs.WORLD)], folder


def gap(ours, theirs, start):
    """Return the largest difference of two states, relative to the largest change since the start."""
    assert ours.keys() == theirs.keys()
    moved = max(float((theirs[name] - start[name]).abs().max()) for name in start)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / moved


def start_of(name, rank=0):
    torch.manual_seed(100 + rank)
    task = sharded_runs.TASKS[name]()
    task.configure_model()
    return sharded_runs.state_of(task)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_equal_one_process(ranks, name, tmp_path):
    (first, _), _ = ranks
    _, alone = sharded_runs.fit(name, tmp_path)
    reference, start = sharded_runs.state_of(alone), start_of(name)
    assert gap(first[name]["state"], reference, start) < (1e-5 if name == "head" else 1e-12)  # float32 and float64
    assert gap(start, reference, start) == 1  # the measure notices a run that learnt nothing


def test_adapters_stay_wide_on_a_half_precision_base(ranks, tmp_path):
    (first, _), _ = ranks
    state = first["half"]["state"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    _, alone = sharded_runs.fit("half", tmp_path)
    reference, start = sharded_runs.state_of(alone), start_of("half")
    off, moved = (torch.cat([(one[k] - reference[k]).flatten() for k in reference]).norm() for one in (state, start))
    assert off < 0.1 * moved  # Adam turns bfloat16's roundings into whole steps where gradients vanish


@pytest.mark.parametrize("name", sharded_runs.TASKS)
def test_ranks_agree_whatever_their_seeds(ranks, name):
    (first, second), _ = ranks
    assert first[name]["sharded"] > 0
    for key, tensor in first[name]["state"].items():
        assert torch.equal(tensor, second[name]["state"][key]), key


def test_their_seeds_do_differ():
    start, other = start_of("head"), start_of("head", rank=1)
    assert any(not torch.equal(other[key], start[key]) for key in start)


def test_one_folder_that_a_single_process_loads(ranks):
    (first, _), folder = ranks
    kept = sorted(path.name for path in (folder / "head").iterdir())
    assert kept == [
        "epoch=0-step=2",
        "epoch=0-step=2.ckpt",
        "epoch=1-step=4",
        "epoch=1-step=4.ckpt",
        "last",
        "last.ckpt",
    ]
    torch.manual_seed(7)
    task = Tagger()
    model = task.configure_backbone()
    attach(model, sharded_runs.tagger().methods[0])
    manifest = load_adapter(model, folder / "head" / "last")
    assert manifest.step == 4
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, first["head"]["state"][name]), name
    for name in sharded_runs.TASKS:
        assert read_adapter_folder(folder / name / "last")[0].step == 4


def test_checkpoint_resumes_over_two_ranks_and_in_one_process(ranks, tmp_path):
    (first, second), folder = ranks
    end, half = first["head"]["state"], folder / "head" / "epoch=0-step=2.ckpt"
    for name, tensor in end.items():
        assert torch.equal(first["resumed"]["state"][name], tensor), name
        assert torch.equal(second["resumed"]["state"][name], tensor), name
    _, alone = sharded_runs.fit("head", tmp_path, ckpt_path=half)
    start = start_of("head")
    assert gap(sharded_runs.state_of(alone), end, start) < 1e-5
    middle = torch.load(half, weights_only=True)["state_dict"]
    assert gap({name: middle[f"model.{name}"] for name in end}, end, start) > 1e-2  # it had not yet arrived


def test_ddp_starts_from_rank_0_too(ranks):
    (first, second), _ = ranks
    for name, tensor in first["ddp"]["state"].items():
        assert torch.equal(tensor, second["ddp"]["state"][name]), name
    assert gap(first["ddp"]["state"], first["head"]["state"], start_of("head")) < 1e-5


def test_what_needs_whole_parameters_is_refused_in_a_sentence(ranks):
    (first, _), _ = ranks
    assert first["refused"].keys() == {"detach", "merge", "deepcopy"}
    for action, sentence in first["refused"].items():
        assert re.search(r"needs whole parameters, and this model's are sharded over several processes", sentence)
        assert action == "deepcopy" or sentence.startswith(action)


def test_ranks_with_different_bases_are_refused(monkeypatch):
    monkeypatch.setattr(fsdp2.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(fsdp2.dist, "all_gather_object", lambda found, _: found.__setitem__(slice(None), ["ab", "cd"]))
    with pytest.raises(ConfigError, match="Rank 1 loaded another base model than rank 0"):
        fsdp2._check_same_base("ab")
    monkeypatch.setattr(fsdp2.dist, "all_gather_object", lambda found, _: found.__setitem__(slice(None), ["ab", "ab"]))
    fsdp2._check_same_base("ab")


def test_tensor_parallelism_is_refused():
    class Mesh(dict):
        def size(self):
            return 2

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    strategy._device_mesh = Mesh(tensor_parallel=Mesh())
    task = sharded_runs.tagger()
    task.configure_model()
    trainer = type("Trainer", (), {"strategy": strategy})()
    with pytest.raises(ConfigError, match="2-fold tensor parallelism"):
        fsdp2.shard_for_trainer(task.adapted, "ab", trainer)


def test_no_folder_of_what_is_never_whole():
    task = sharded_runs.tagger()
    task.configure_model()
    assert writes_folders(task, task.adapted)
    next(task.adapted.parameters()).ds_id = 0  # as DeepSpeed marks what it partitions
    assert not writes_folders(task, task.adapted)
