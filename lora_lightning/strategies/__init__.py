"""Distribution of a task's parameters over several processes."""

from lora_lightning.strategies.facts import StrategyFacts, facts_of
from lora_lightning.strategies.fsdp2 import FSDP2Strategy

__all__ = ["FSDP2Strategy", "StrategyFacts", "facts_of"]
