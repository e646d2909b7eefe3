"""Roles to parameter groups, optimizers and schedules."""

from lora_lightning.optim.config import Optim
from lora_lightning.optim.groups import build_optimizer, param_groups
from lora_lightning.optim.schedule import build_schedule, lr_factor

__all__ = ["Optim", "build_optimizer", "build_schedule", "lr_factor", "param_groups"]
