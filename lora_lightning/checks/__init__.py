"""Checks of a run before its first step."""

from lora_lightning.checks.monitors import refuse_wrong_monitors
from lora_lightning.checks.run_check import RunCheck
from lora_lightning.checks.trainer_errors import mistake_of_settings

__all__ = ["RunCheck", "mistake_of_settings", "refuse_wrong_monitors"]
