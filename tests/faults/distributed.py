"""Faults of runs on several devices, as far as one process can show them."""

from lora_lightning.data.base import TokenizedData
from tests.faults.bench import FIT, Fault

monkeypatch = None  # the test's own, which undoes what a row replaces


def with_ranks(count, *arguments):
    """Run as the first of several ranks, as the data modules see it."""

    def provoke():
        monkeypatch.setattr(TokenizedData, "_ranks", lambda _: (count, 0))
        return [*FIT, *arguments]

    return provoke


FAULTS = [
    Fault(
        "fewer training rows than ranks",
        r"^train has 32 rows for 33 ranks, so that some would have none",
        with_ranks(33),
    ),
    Fault("fewer validation rows than ranks", r"^val has 4 rows for 5 ranks", with_ranks(5)),
    Fault(
        "unknown strategy",
        r"^You selected an invalid strategy name: `strategy='dpp'`",
        [*FIT, "--trainer.strategy", "dpp"],
    ),
    Fault(
        "no devices",
        r"^`Trainer\(devices='0'\)` value is not a valid input using cpu accelerator",
        [*FIT, "--trainer.devices", "0"],
    ),
    Fault(
        "GPUs that are not there",
        r"^`CUDAAccelerator` can not run on your system since the accelerator is not available",
        [*FIT, "--trainer.accelerator", "cuda"],
    ),
    Fault(
        "FSDP without a GPU",
        r"^The strategy `fsdp` requires a GPU accelerator, but received `accelerator='cpu'`",
        [*FIT, "--trainer.strategy", "fsdp"],
    ),
    Fault(
        "unknown accelerator",
        r"^You selected an invalid accelerator name: `accelerator='cpuu'`\. Available names are: auto",
        [*FIT, "--trainer.accelerator", "cpuu"],
    ),
]
