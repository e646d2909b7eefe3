"""Draw methods with random settings that a model may take; what it does not take must be refused in a sentence."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from lora_lightning.adapters import Method
from lora_lightning.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRADrop,
    LoRAFA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TrainableTokens,
    VeRA,
)

PROMPTS = (PromptTuning, PTuning, PrefixTuning, PTuningV2)
_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, transformers.pytorch_utils.Conv1D)
_LOW_RANK = (LoRA, DoRA, LoRAFA, LoRADrop, DeltaLoRA)


@dataclass(frozen=True)
class Setting:
    """What is attached.

    Args:
        methods: The methods.
        train_norm_statistics: As `attach` takes it.
    """

    methods: list[Method]
    train_norm_statistics: bool = False

    @property
    def starts_at_base(self) -> bool:
        """Whether the first forward equals the base's."""
        return not any(isinstance(method, PROMPTS) for method in self.methods)

    def __str__(self) -> str:
        shown = " + ".join(_shown(method) for method in self.methods)
        return shown + (" train_norm_statistics" if self.train_norm_statistics else "")


def _shown(method: Method) -> str:
    given = {
        key: value for key, value in vars(method).items() if key == "r" or value != getattr(type(method), key, None)
    }
    return f"{type(method).__name__}({', '.join(f'{key}={value!r}' for key, value in given.items())})"


class Names:
    """The modules of one model that settings may name.

    Args:
        model: The model.
        rng: Where the draws come from.
    """

    def __init__(self, model: nn.Module, rng: random.Random) -> None:
        self.rng = rng
        modules = [(path, module) for path, module in model.named_modules() if path]
        self.adaptable = [path for path, module in modules if isinstance(module, _ADAPTABLE)] or ["none"]
        self.linear = [path for path, module in modules if isinstance(module, _ADAPTABLE[::4])] or self.adaptable
        self.biased = [path for path, module in modules if getattr(module, "bias", None) is not None] or ["none"]
        modules = [(path, module) for path, module in modules if "parametrizations" not in path]
        self.any = [path for path, module in modules if next(module.parameters(recurse=False), None) is not None]
        self.experts = [
            path for path, module in modules if any(one.dim() == 3 for one in module.parameters(recurse=False))
        ]
        self.embeddings = [path for path, module in modules if isinstance(module, nn.Embedding)]
        self.parameters = [path for path, one in model.named_parameters() if one.dim() in (2, 3)] or ["none"]
        self.containers = [path for path, module in modules if next(module.children(), None) is not None]

    def suffix(self, paths: list[str]) -> str:
        """Return the last one, two or all parts of a random path."""
        parts = self.rng.choice(paths).split(".")
        length = self.rng.choice([1, 1, 1, 2, len(parts)])
        named = parts[-length:]
        while named[0].isdigit() and len(named) < len(parts):
            named = parts[-len(named) - 1 :]
        return ".".join(named)

    def targets(self) -> list[str] | str | None:
        """Return some targets, in any of the forms that methods take."""
        form = self.rng.choice(["usual", "all", "list", "list", "list", "regex", "experts", "ends", "parameter"])
        if form == "usual":
            return None
        if form == "all":
            return "all-linear"
        if form == "regex":
            return rf".*\.?{self.suffix(self.adaptable).replace('.', '[.]')}"
        if form == "experts" and self.experts:
            return [self.suffix(self.experts), *([self.suffix(self.linear)] if self.rng.random() < 0.5 else [])]
        if form == "ends":  # embeddings and output layers, which may be tied
            return [self.suffix([self.rng.choice([*self.embeddings, *self.adaptable[-1:]])])]
        if form == "parameter":
            return [self.suffix(self.parameters), self.suffix(self.linear)]
        pool = self.rng.choice([self.linear, self.linear, self.adaptable])
        return sorted({self.suffix(pool) for _ in range(self.rng.choice([1, 1, 2, 3]))})

    def targeted(self) -> dict[str, Any]:
        """Return settings that every method with targets takes."""
        given: dict[str, Any] = {"target_modules": self.targets()}
        if self.rng.random() < 0.15:
            given["exclude_modules"] = [self.suffix(self.adaptable)]
        if self.rng.random() < 0.15:
            given["layers_to_transform"] = self.rng.choice([0, [1], [0, 1]])
        return given

    def saved(self) -> dict[str, Any]:
        """Return copies to train, seldom."""
        if self.rng.random() > 0.15:
            return {}
        pools = self.any[-3:], self.any + self.containers, self.embeddings or self.any
        pool = self.rng.choice(pools)
        return {"modules_to_save": [self.suffix(pool)]}


def draw(model: nn.Module, rng: random.Random) -> Setting:
    """Draw one to three methods with their settings, for a model."""
    names = Names(model, rng)
    count = rng.choice([1, 1, 1, 1, 2, 2, 3])
    methods = [_one(names, rng) for _ in range(count)]
    return Setting(methods, train_norm_statistics=rng.random() < 0.1)


def _one(names: Names, rng: random.Random) -> Method:
    cls = rng.choice(
        [LoRA, *_LOW_RANK, AdaLoRA, VeRA, IA3, BitFit, BottleneckAdapter, TrainableTokens, PromptTuning, PromptTuning]
    )
    if cls is PromptTuning:
        cls = rng.choice(PROMPTS)
    if cls in _LOW_RANK:
        return _low_rank(cls, names, rng)
    return cls(**_MAKERS[cls](names, rng), **names.saved())


def _low_rank(cls: type[LoRA], names: Names, rng: random.Random) -> Method:
    given: dict[str, Any] = {
        **names.targeted(),
        **names.saved(),
        "r": rng.choice([1, 2, 3, 4, 8]),
        "alpha": rng.choice([1.0, 4.0, 16.0]),
        "scaling": rng.choice(["standard", "standard", "rslora", "alpha"]),
        "init": rng.choice(["kaiming", "kaiming", "gaussian", "gaussian_sqrt"]),
    }
    if cls in (LoRA, DoRA) and rng.random() < 0.2:
        given["init"] = rng.choice(["pissa", "olora", "eva"] if cls is LoRA else ["pissa", "olora"])
    if cls is not DeltaLoRA and rng.random() < 0.3:
        given["dropout"] = 0.2
    if rng.random() < 0.15 and isinstance(given["target_modules"], list):
        given["rank_pattern"] = {given["target_modules"][0]: rng.choice([1, 5])}
    if rng.random() < 0.1 and isinstance(given["target_modules"], list):
        given["alpha_pattern"] = {given["target_modules"][0]: 2.0}
    if cls is DoRA and rng.random() < 0.4:
        given["magnitude_axis"] = "input"
    if cls is DeltaLoRA:
        given["start_step"] = rng.choice([0, 1, 100])
    if cls is LoRADrop:
        given.update(threshold=rng.choice([0.3, 0.9]), calibration_steps=1, sample_batches=1)
    return cls(**given)


def _tokens(_: Names, rng: random.Random) -> dict[str, Any]:
    return {"token_indices": sorted(rng.sample(range(5, 40), 30))}


def _bottleneck(_: Names, rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {"style": rng.choice(["houlsby", "pfeiffer", "parallel"]), "width": rng.choice([2, 5])}
    if rng.random() < 0.2:
        given["leave_out"] = [0]
    if rng.random() < 0.2:
        given["dropout"] = 0.2
    return given


def _bitfit(names: Names, rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {}
    if rng.random() < 0.3:
        return {"bias": [names.suffix(names.linear)], "add_bias": True}
    return {"bias": sorted({names.suffix(names.biased) for _ in range(2)})}


def _adalora(names: Names, rng: random.Random) -> dict[str, Any]:
    return {**names.targeted(), "target_r": rng.choice([1, 2]), "init_r": rng.choice([2, 4])}


def _vera(names: Names, rng: random.Random) -> dict[str, Any]:
    return {**names.targeted(), "r": rng.choice([2, 8]), "save_projection": rng.random() < 0.3}


def _ia3(names: Names, rng: random.Random) -> dict[str, Any]:
    given = names.targeted()
    if isinstance(given["target_modules"], list) and rng.random() < 0.5:
        given["feedforward_modules"] = [given["target_modules"].pop()] if len(given["target_modules"]) > 1 else []
    return given


def _prompt(_: Names, rng: random.Random) -> dict[str, Any]:
    return {"num_virtual_tokens": rng.choice([1, 3])}


def _p_tuning(names: Names, rng: random.Random) -> dict[str, Any]:
    return {**_prompt(names, rng), "encoder": rng.choice(["mlp", "lstm"]), "encoder_hidden_size": 16}


_MAKERS: dict[type[Method], Callable[[Names, random.Random], dict[str, Any]]] = {
    AdaLoRA: _adalora,
    VeRA: _vera,
    IA3: _ia3,
    BitFit: _bitfit,
    BottleneckAdapter: _bottleneck,
    TrainableTokens: _tokens,
    PromptTuning: _prompt,
    PTuning: _p_tuning,
    PTuningV2: _prompt,
    PrefixTuning: lambda names, rng: {**_prompt(names, rng), "encoder_hidden_size": 16},
}
