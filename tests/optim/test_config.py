import pytest
import torch

from lora_lightning.errors import ConfigError
from lora_lightning.optim import Optim


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, ["lr", "above 0", "0.0"]),
        ({"lr": float("nan")}, ["lr", "nan"]),
        ({"lr": None}, ["lr", "None"]),
        ({"head_lr": -1.0}, ["head_lr", "-1.0"]),
        ({"embedding_lr": float("inf")}, ["embedding_lr", "inf"]),
        ({"lora_plus_ratio": 0}, ["lora_plus_ratio"]),
        ({"weight_decay": -0.1}, ["weight_decay", "at least 0"]),
        ({"warmup": -1}, ["warmup"]),
        ({"warmup": 1.5}, ["warmup", "share below 1"]),
        ({"schedule": "cosinus"}, ["constant, linear, cosine", "cosinus"]),
        ({"optimizer": "AdmaW"}, ["AdmaW", "did you mean AdamW"]),
        ({"optimizer": "torch.nn.Linear"}, ["not a subclass of torch.optim.Optimizer"]),
        ({"optimizer": "no_such_package.Sgd"}, ["There is no module `no_such_package`"]),
        ({"optimizer": {"init_args": {}}}, ["class_path"]),
        ({"optimizer": {"class_path": "SGD", "init_args": {"betas": [0.9, 0.99]}}}, ["SGD", "betas", "momentum"]),
        ({"optimizer": {"class_path": "SGD", "init_args": {"lr": 1.0}}}, ["lr", "beside the optimizer"]),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError) as caught:
        Optim(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_optimizer_class_is_found_by_short_and_by_full_name():
    assert Optim().optimizer_class() == (torch.optim.AdamW, {})
    spec = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    assert Optim(optimizer=spec).optimizer_class() == (torch.optim.SGD, {"momentum": 0.9})
