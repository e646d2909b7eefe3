import copy

import torch
from torch import nn

from lora_lightning.backbones.storage.samples import SAMPLES, host_sample, keep_sample, sample


def test_the_first_and_the_last_value_are_taken():
    weight = torch.arange(3000.0).reshape(50, 60)
    values = sample(weight)
    assert values.shape == (SAMPLES,)
    assert (values[0], values[-1]) == (0, 2999)
    assert values.unique().numel() == SAMPLES


def test_a_transposed_weight_is_read_in_row_order():
    weight = torch.arange(6.0).reshape(3, 2).t()
    assert sample(weight).tolist() == weight.flatten().tolist()


def test_what_was_kept_counts_and_travels_with_a_copy_but_not_with_the_state():
    host = nn.Linear(2, 3)
    values, are_original = host_sample(host)
    assert are_original
    assert values.tolist() == host.weight.flatten().tolist()
    keep_sample(host, torch.ones(6))
    values, are_original = host_sample(copy.deepcopy(host))
    assert are_original
    assert values.tolist() == [1.0] * 6
    assert set(host.state_dict()) == {"weight", "bias"}
