"""What is said of a strategy, against the strategies that Lightning has."""

import lightning as L
import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lora_lightning import FSDP2Strategy
from lora_lightning.strategies.facts import facts_of, shards_by_name


def trainer(**settings):
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **settings)


@pytest.mark.parametrize(
    ("strategy", "shards", "partitions", "flattens"),
    [
        (None, False, False, False),
        (FSDP2Strategy(process_group_backend="gloo"), True, False, False),
        (ModelParallelStrategy(), True, False, False),
        (DeepSpeedStrategy.__new__(DeepSpeedStrategy), False, True, False),
        (FSDPStrategy.__new__(FSDPStrategy), False, False, True),
    ],
)
def test_facts(strategy, shards, partitions, flattens):
    # DeepSpeed is not installed, and FSDP1 wants a GPU: only their classes are looked at.
    of = trainer() if strategy is None else type("Trainer", (), {"strategy": strategy})()
    facts = facts_of(of)
    assert (facts.shards, facts.partitions, facts.flattens) == (shards, partitions, flattens)
    assert facts.keeps_whole == (strategy is None)
    assert facts.is_known
    assert facts.name == type(of.strategy).__name__


def test_data_parallel_processes_keep_everything():
    facts = facts_of(trainer(strategy="ddp", devices=2))
    assert facts.keeps_whole
    assert facts.is_known


def test_an_unknown_strategy_is_not_known():
    class Own(Strategy):
        pass

    Own.__abstractmethods__ = frozenset()
    assert not facts_of(type("Trainer", (), {"strategy": Own.__new__(Own)})()).is_known


def test_names_of_strategies():
    sharding = ["fsdp2", "FSDP2Strategy", {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}]
    assert all(map(shards_by_name, sharding))
    assert not any(map(shards_by_name, ["ddp", "auto", None, "deepspeed_stage_2"]))
