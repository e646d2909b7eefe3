import math

import pytest
import torch
from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.optim import Optim, build_schedule, lr_factor


def factors(schedule, num_warmup, num_steps):
    return [lr_factor(s, schedule=schedule, num_warmup=num_warmup, num_steps=num_steps) for s in range(num_steps + 1)]


def test_linear_decay_reaches_zero_after_the_last_step():
    assert factors("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_decay_follows_the_cosine():
    expected = [0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(5)]
    assert factors("cosine", 0, 4) == pytest.approx(expected)


def test_warmup_rises_linearly_and_never_starts_at_zero():
    assert factors("constant", 3, 5) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("warmup", "peak_step"), [(0.5, 5), (3, 3), (0, 0)])
def test_warmup_is_a_share_or_a_number_of_steps(warmup, peak_step):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = build_schedule(optimizer, Optim(warmup=warmup), 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == peak_step
    assert max(rates) == 2.0


def test_a_run_without_an_end_needs_a_constant_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match="max_steps"):
        build_schedule(optimizer, Optim(schedule="linear"), math.inf)
    build_schedule(optimizer, Optim(schedule="constant", warmup=3), math.inf)
