"""What `AdapterFinetuning` refuses before it touches a LightningModule, and what it says of it."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lora_lightning.adapters import Method, iter_hosts
from lora_lightning.adapters.targets import is_within
from lora_lightning.adapters.view import output_embeddings
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import ConfigError
from lora_lightning.finetuning.parts import SHARDS_ITSELF
from lora_lightning.finetuning.record import Part, is_finetuned
from lora_lightning.strategies.facts import facts_of
from lora_lightning.tasks import AdapterTask


def refuse_module(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse modules and strategies that attach, shard or copy by themselves.

    Raises:
        ConfigError: It is one of them.
    """
    if isinstance(module, AdapterTask):
        raise ConfigError("An AdapterTask attaches its own `method`; leave AdapterFinetuning out.")
    facts = facts_of(trainer)
    if not facts.keeps_whole:
        raise ConfigError(f"AdapterFinetuning runs on one device or with DDP, not with {facts.name}. {SHARDS_ITSELF}")
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and not is_finetuned(module):
        raise ConfigError(
            "This strategy starts processes that get a copy of the module, so the adapters would be lost with them. "
            'Use strategy="ddp", or call lora_lightning.finetune(module, method, submodule) before the Trainer starts.'
        )


def refuse_order(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuse callbacks that copy the module before it has its adapters.

    Raises:
        ConfigError: One stands before `callback`.
    """
    before: list[L.Callback] = []
    for one in _callbacks(trainer):
        if one is callback:
            break
        before.append(one)
    copying = [one for one in before if isinstance(one, WeightAveraging | StochasticWeightAveraging)]
    if copying:
        raise ConfigError(
            f"{type(copying[0]).__name__} copies the module before it has its adapters. Put AdapterFinetuning before "
            "it in the list of callbacks."
        )


def refuse_methods(methods: Sequence[Method], module: L.LightningModule) -> None:
    """Refuse methods that need more of a module than its steps.

    Raises:
        ConfigError: A method looks at data before the first step, or adds to the loss of a module that optimizes by
            itself.
    """
    calibrating = [type(method).__name__ for method in methods if method.calibrates]
    if calibrating:
        raise ConfigError(
            f"{calibrating[0]} with these settings looks at training data before the first step, which "
            "AdapterFinetuning does not offer. Use an AdapterTask, or another init."
        )
    penalizing = [type(method).__name__ for method in methods if type(method).extra_loss is not Method.extra_loss]
    if penalizing and not module.automatic_optimization:
        raise ConfigError(
            f"{penalizing[0]} adds a penalty to the loss that training_step returns, and {type(module).__name__} "
            "optimizes manually. Use another method, or automatic optimization."
        )


def announce(module: L.LightningModule, part: Part) -> None:
    """Say how much of the module trains."""
    num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    num_all = sum(parameter.numel() for parameter in module.parameters())
    names = " and ".join(type(method).__name__ for method in part.methods)
    frozen = frozen_heads(part.submodule(module))
    heads = f" Its head {', '.join(map(repr, frozen))} is frozen; modules_to_save={frozen} trains it." if frozen else ""
    rank_zero_info(
        f"{names} on {part.name}: {num_trained:,} of {num_all:,} parameters of {type(module).__name__} train.{heads}"
    )


def frozen_heads(model: nn.Module) -> list[str]:
    """Return the paths of a transformers model's heads that no adapter trains, such as a new `classifier`.

    Output layers of language models are left out: they are pretrained, and rest in most runs.
    """
    output = output_embeddings(model) if hasattr(model, "get_output_embeddings") else None
    hosts = [path for path, _ in iter_hosts(model)]
    heads = view_of(model).head_paths() if hasattr(model, "base_model_prefix") else []
    return [
        path
        for path in heads
        if model.get_submodule(path) is not output and not any(is_within(host, [path]) for host in hosts)
    ]


def averages_stochastically(trainer: L.Trainer) -> bool:
    """Return whether a Trainer has Lightning's `StochasticWeightAveraging`, which copies the module in its `setup`."""
    return any(isinstance(one, StochasticWeightAveraging) for one in _callbacks(trainer))


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    found: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
    return found
