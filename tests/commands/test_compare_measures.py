"""What `compare` measures: the two ends, saved bytes, steps to reach a loss."""

from __future__ import annotations

import os

import torch

from lora_lightning.adapters import adapter_state_dict
from lora_lightning.commands._compare import ends
from lora_lightning.commands._compare.measure import saved_for_backward
from lora_lightning.commands._compare.records import read_result, write_result
from lora_lightning.commands._compare.report.reach import first_step, speed_ups, steps_to_reach
from lora_lightning.optim import Optim, param_groups
from tests.commands.compare_toys import Points


def points(cls=Points, **optim):
    task = cls(method=ends.no_adapters(), optim=Optim(**optim))
    task.configure_model()
    return task


def test_the_frozen_end_trains_its_head_alone():
    assert ends.trainable_counts(points().adapted) == (0, 18)
    assert set(adapter_state_dict(points().adapted)) == {"4.weight", "4.bias"}


def test_the_full_end_trains_everything_at_two_rates():
    task = points(ends.fully_trained(Points), lr=1e-4, head_lr=1e-2, weight_decay=0.1)
    assert ends.trainable_counts(task.adapted) == (2 * (8 * 8 + 8), 18)
    groups = ends.split_base(param_groups(task, task.optim), task.adapted, task.optim)
    rates = {parameter: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == 6
    assert rates[task.adapted[0].weight] == (1e-4, 0.1)
    assert rates[task.adapted[2].bias] == (1e-4, 0.0)
    copy = adapter_state_dict(task.adapted)
    head = [parameter for parameter in rates if any(parameter.data_ptr() == t.data_ptr() for t in copy.values())]
    assert [rates[parameter][0] for parameter in head] == [1e-2, 1e-2]
    assert task.adapted[4].weight not in rates  # the copy stands in for it


# Measures.


def test_saved_bytes_are_those_of_the_formula():
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh()), torch.randn(4, 8)
    expected = 4 * (4 * 8 + 4 * 16)  # the layer's input and what tanh gave
    assert saved_for_backward(model, lambda: model(x).sum()) == expected
    model.requires_grad_(requires_grad=False)
    assert saved_for_backward(model, lambda: model(x).sum()) == 0


def test_results_count_for_their_own_spec_alone(tmp_path):
    path, spec = tmp_path / "x" / "one.json", {"steps": 3, "rate": 1e-3}
    assert read_result(path, spec) is None
    write_result(path, spec, {"val": {"loss": 1.0}})
    assert read_result(path, dict(reversed(spec.items()))) == {"val": {"loss": 1.0}}
    assert read_result(path, {**spec, "steps": 4}) is None
    path.write_text(path.read_text()[:40])
    assert read_result(path, spec) is None
    assert os.listdir(path.parent) == ["one.json"]  # noqa: PTH208 - hidden files as well


def run_of(*losses):
    return {
        "val": {"loss": losses[-1]},
        "validations": [{"step": 10 * (i + 1), "loss": x} for i, x in enumerate(losses)],
    }


def test_steps_to_reach():
    reference = {0: run_of(0.9, 0.7, 0.6, 0.5), 1: run_of(0.9, 0.4, 0.3, 0.35)}
    other = {0: run_of(0.8, 0.5, 0.4), 1: run_of(0.9, 0.8, 0.7)}
    assert first_step(reference[0]["validations"], 0.5) == 40
    own, steps = steps_to_reach(reference, reference), steps_to_reach(other, reference)
    assert (own, steps) == ({0: 40, 1: 30}, {0: 20, 1: None})
    assert speed_ups(steps, own) == {0: 2.0, 1: None}
    assert speed_ups(own, own) == {0: 1.0, 1: 1.0}
