"""The benchmark on a model of two small layers: what it compares, counts, writes and refuses."""

import csv
import dataclasses
import json

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks.contenders import build
from benchmarks.equality import check_equal
from benchmarks.workloads import WORKLOADS, Workload
from tests import models

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# PEFT's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> Workload:
    workload = Workload(
        name="tiny",
        title="a tiny Llama",
        build=lambda: models.build("llama").train(),
        rows=2,
        length=16,
        vocabulary=models.VOCABULARY,
        targets=TARGETS,
        first_outputs=tuple(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
        r=2,
        supervised=0.5,
    )
    monkeypatch.setitem(WORKLOADS, "tiny", workload)
    monkeypatch.setattr(benchmark, "BASELINE", benchmark.BASELINE)  # a test may point it elsewhere
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return workload


def unchanged(model: torch.nn.Module) -> torch.nn.Module:
    return model


@pytest.mark.parametrize(
    ("ours", "theirs"), [("lora", "peft lora"), ("dora", "peft dora"), ("dora, lean", "peft dora")]
)
def test_ours_and_theirs_agree_before_anything_is_timed(tiny, ours, theirs):
    batch = tiny.batch(torch.device("cpu"))
    pair = build(ours, tiny, unchanged), build(theirs, tiny, unchanged)
    assert check_equal(*pair, batch, torch.float32) < 1e-5


def test_contenders_that_differ_are_not_timed(tiny):
    batch = tiny.batch(torch.device("cpu"))
    ours, theirs = build("lora", tiny, unchanged), build("peft lora", tiny, unchanged)
    other = dataclasses.replace(theirs, loss=lambda batch: 1.01 * theirs.loss(batch))
    with pytest.raises(ValueError, match=r"differ by 9\.9e-03"):
        check_equal(ours, other, batch, torch.float32)


def test_a_run_prints_and_writes_every_figure(tmp_path, capsys):
    names = ["full", "lora", "lora, lean", "peft lora"]
    arguments = ["--workloads", "tiny", "--rounds", "2", "--warm-up", "0", "--output_dir", str(tmp_path)]
    assert benchmark.main([*arguments, "--contenders", *names]) == 0
    out, err = capsys.readouterr()
    assert "lora equals peft lora to" in err
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    assert all(f"| {name} |" in out for name in ["bound", *names])
    rows = {row["contender"]: row for row in csv.DictReader((tmp_path / "benchmark.csv").open())}
    assert set(rows) == {"bound", *names}
    assert float(rows["bound"]["to_bound_median"]) == 1
    assert rows["lora"]["to_peft_median"]
    assert not rows["full"]["to_peft_median"]
    assert int(rows["lora"]["trained"]) == int(rows["peft lora"]["trained"]) < int(rows["full"]["trained"])
    assert int(rows["lora, lean"]["saved_bytes"]) < int(rows["lora"]["saved_bytes"])
    assert int(rows["bound"]["flops"]) < int(rows["lora"]["flops"]) < int(rows["full"]["flops"])


def test_a_quick_run_is_measured_against_the_baseline(tmp_path, monkeypatch, capsys):
    baseline = tmp_path / "baseline.json"
    monkeypatch.setattr(benchmark, "BASELINE", baseline)
    arguments = ["--quick", "--workloads", "tiny", "--contenders", "lora", "--output_dir", str(tmp_path / "out")]
    assert benchmark.main([*arguments, "--write-baseline"]) == 0
    assert benchmark.main(arguments) == 0
    figures = json.loads(baseline.read_text())
    figures["tiny: lora"]["saved_bytes"] = int(figures["tiny: lora"]["saved_bytes"] * 0.9)
    baseline.write_text(json.dumps(figures))
    assert benchmark.main(arguments) == 1
    assert "tiny: lora: saved_bytes is" in capsys.readouterr().err
