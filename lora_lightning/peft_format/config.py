"""What an `adapter_config.json` of PEFT says, checked against our own schema before anything is built from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from lora_lightning.adapters.patterns import compile_pattern, match_start
from lora_lightning.errors import CheckpointError, ConfigError

CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"

# How an adapter was initialised matters only where PEFT also changed the base weights while doing so.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "true", "false")

# What PEFT writes that changes nothing about what the adapter computes.
_IGNORED = {
    "auto_mapping",
    "base_model_class",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "lora_ga_config",
    "megatron_core",
    "parent_library",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The part of PEFT's `LoraConfig` that this library computes; for each field see there.

    Args:
        r: Usual rank.
        alpha: Usual `lora_alpha`.
        dropout: `lora_dropout`.
        use_rslora: Whether the scaling is alpha / sqrt(r).
        use_dora: Whether the adapter is DoRA.
        target_modules: Path suffixes, a regular expression for whole paths, `all-linear`, or None where the file does
            not say.
        target_parameters: Path suffixes of the 3-D parameters of experts.
        exclude_modules: The same as `target_modules`, for modules left out.
        layers_to_transform: Layer indices, or None for all.
        layers_pattern: Names of the lists of layers, or empty for any.
        modules_to_save: Endings of the paths of modules trained as copies.
        rank_pattern: Other ranks, by regular expression for the end of a path.
        alpha_pattern: Other alphas, likewise.
        base: Name of the base model, or None.
        task_type: Such as `CAUSAL_LM`, or None.
    """

    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    target_modules: list[str] | str | None
    target_parameters: list[str]
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | None
    layers_pattern: list[str]
    modules_to_save: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base: str | None
    task_type: str | None

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Return rank and alpha of one host, as PEFT's patterns give them."""
        rank = next((value for key, value in self.rank_pattern.items() if _ends_like(path, key)), self.r)
        alpha = next((value for key, value in self.alpha_pattern.items() if _ends_like(path, key)), self.alpha)
        return rank, alpha

    def takes(self, path: str) -> bool:
        """Tell whether a module is a target by PEFT's rules, for targets that are a list or a regular expression."""
        if self.exclude_modules and _matches(path, self.exclude_modules):
            return False
        if any(_match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save):
            return False
        targets = self.target_modules
        if targets is None or not _matches(path, targets):
            return False
        # PEFT asks for the layer neither with a regular expression nor where a target is a whole path.
        if not self.layers_to_transform or isinstance(targets, str) or path in targets:
            return True
        return self._layer(path) in self.layers_to_transform

    def _layer(self, path: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\." for name in self.layers_pattern] or [r".*?\.[^.]*\."]
        found = (_match(rf"{pattern}(\d+)\.", path) for pattern in patterns)
        return next((int(match[1]) for match in found if match), None)


def parse_peft_config(data: Mapping[str, Any], source: str = CONFIG_NAME) -> PeftConfig:
    """Check the content of an `adapter_config.json`.

    Args:
        data: The JSON object.
        source: Where it came from, for messages.

    Raises:
        CheckpointError: It is no LoRA or DoRA, or uses an option that this library does not compute.
    """
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{source}: peft_type is {kind!r}, and of PEFT's adapters this library reads LoRA and DoRA ('LORA')."
        )
    _refuse_unsupported(data, source)
    values: dict[str, Any] = {}
    for key, (name, expected, is_valid, default) in _FIELDS.items():
        value = data.get(key)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{source}: {key} is missing; it must be {expected}.")
            value = default
        elif not is_valid(value):
            raise CheckpointError(f"{source}: {key} must be {expected}, got {value!r:.80}.")
        values[name] = value
    layers, patterns = values["layers_to_transform"], values["layers_pattern"]
    values["layers_to_transform"] = [layers] if isinstance(layers, int) else layers or None
    values["layers_pattern"] = [patterns] if isinstance(patterns, str) and patterns else list(patterns or [])
    config = PeftConfig(**values)
    _check_patterns(config, source)
    return config


def _refuse_unsupported(data: Mapping[str, Any], source: str) -> None:
    """Name what changes the result and is not computed here, also options of versions of PEFT yet to come."""
    init = data.get("init_lora_weights", True)
    if init is not None and init not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{source}: init_lora_weights={init!r} changed the base weights too, so the adapter alone does not give "
            "the model back. Convert it with PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...))."
        )
    if data.get("bias") not in (None, "none"):
        raise CheckpointError(
            f"{source}: bias={data['bias']!r} is not supported: biases of the base were trained. Merge it with PEFT."
        )
    known = {*_FIELDS, *_IGNORED, "peft_type", "init_lora_weights", "bias", "loftq_config"}
    used = sorted(key for key, value in data.items() if key not in known and value)
    if used:
        raise CheckpointError(
            f"{source}: {', '.join(f'{key}={data[key]!r:.40}' for key in used[:3])} is not supported: this library "
            "computes plain LoRA, rsLoRA and DoRA. Merge the adapter with PEFT, or train one without it."
        )


def _check_patterns(config: PeftConfig, source: str) -> None:
    """Refuse malformed regular expressions, before any of them is used."""
    texts = [*config.rank_pattern, *config.alpha_pattern, *config.modules_to_save, *config.layers_pattern]
    texts += [text for text in (config.target_modules, config.exclude_modules) if isinstance(text, str)]
    for text in texts:
        try:
            compile_pattern(text, source)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error


def _match(pattern: str, path: str, *, whole: bool = False) -> regex.Match[str] | None:
    try:
        return match_start(pattern, path, CONFIG_NAME, whole=whole)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _ends_like(path: str, pattern: str) -> bool:
    return _match(rf"(.*\.)?({pattern})$", path) is not None


def _matches(path: str, targets: list[str] | str) -> bool:
    if isinstance(targets, str):
        return _match(targets, path, whole=True) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_names_or_text(value: object) -> bool:
    return _is_text(value) or _is_names(value)


def _is_layers(value: object) -> bool:
    items: Iterable[object] = value if isinstance(value, list) else [value]
    return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items)


def _is_map_of(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(key, str) and is_value(item) for key, item in value.items())
    )


_REQUIRED = object()
_NAMES = "a list of names or null"

# PEFT's name -> ours, what it must be in words, the test for it, and what null or nothing means.
_FIELDS: dict[str, tuple[str, str, Callable[[object], bool], Any]] = {
    "r": ("r", "a whole number from 1", _is_count, _REQUIRED),
    "lora_alpha": ("alpha", "a number above 0", _is_number, _REQUIRED),
    "lora_dropout": ("dropout", "a number from 0 and below 1", _is_share, 0.0),
    "use_rslora": ("use_rslora", "true or false", _is_flag, False),
    "use_dora": ("use_dora", "true or false", _is_flag, False),
    "target_modules": ("target_modules", "a list of names, a text or null", _is_names_or_text, None),
    "target_parameters": ("target_parameters", _NAMES, _is_names, []),
    "exclude_modules": ("exclude_modules", "a list of names, a text or null", _is_names_or_text, None),
    "layers_to_transform": ("layers_to_transform", "whole numbers from 0, or null", _is_layers, None),
    "layers_pattern": ("layers_pattern", "a list of names, a text or null", _is_names_or_text, ""),
    "modules_to_save": ("modules_to_save", _NAMES, _is_names, []),
    "rank_pattern": ("rank_pattern", "an object of whole numbers from 1", _is_map_of(_is_count), {}),
    "alpha_pattern": ("alpha_pattern", "an object of numbers above 0", _is_map_of(_is_number), {}),
    "base_model_name_or_path": ("base", "a text or null", _is_text, None),
    "task_type": ("task_type", "a text or null", _is_text, None),
}
