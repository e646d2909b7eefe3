"""Faults of runs on several devices, as far as one process can show them.

With processes of their own: a rank that is killed (`tests/callbacks/test_rank_watch.py`), a signal and a loss that is
not finite on one rank alone (`tests/callbacks/test_signal_guard.py::test_two_ranks`), fewer rows than ranks
(`tests/data/ranks_script.py`).
"""

from lora_lightning.callbacks import RankWatch
from lora_lightning.callbacks.rank_links import Loss
from lora_lightning.data.base import TokenizedData
from tests.faults.bench import FIT, Fault, replaced


def with_ranks(count):
    """Run as the first of several ranks, as the data modules see it."""
    return replaced(TokenizedData, "_ranks", lambda _: (count, 0))


def hear_of_a_death(watch, *_, stage):
    """Stand in for the connections between the ranks."""
    watch._loss = Loss(1, "node7", "its process ended without a word (killed, or out of memory)")
    watch._is_known.set()


FAULTS = [
    Fault(
        "fewer training rows than ranks",
        r"^train has 32 rows for 33 ranks, so that some would have none",
        with_ranks(33),
    ),
    Fault("fewer validation rows than ranks", r"^val has 4 rows for 5 ranks", with_ranks(5)),
    Fault(
        "dead rank",
        r"^Rank 1 on node7 is gone: its process ended without a word .*The run ends; it had saved no checkpoint yet",
        replaced(RankWatch, "setup", hear_of_a_death),
        status=75,
        leaves_run=True,
    ),
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
