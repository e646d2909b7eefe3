"""The text of a config, with comments."""

from __future__ import annotations

import json
import re
from typing import Any

from lora_lightning.commands._init.choice import DATA_MODULES, Choice
from lora_lightning.commands._init.columns import words
from lora_lightning.commands._init.recipe import Recipe
from lora_lightning.commands._init.sample import Sample

_PLAIN = re.compile(r"[A-Za-z][\w./-]*")
_NOT_A_TEXT = words("y n yes no true false on off null none nan inf")


def config_text(sample: Sample, choice: Choice, backbone: str, recipe: Recipe, comments: dict[str, str]) -> str:
    """Return a config.

    Args:
        sample: The sample of the training rows.
        choice: The task.
        backbone: The backbone.
        recipe: Settings of the training.
        comments: Comments after settings, by the setting's name; `head` and `labels` are separate lines.
    """
    monitor, mode = recipe.monitor
    method = (
        f"{{class_path: LoRA, init_args: {{r: {recipe.rank}, alpha: {2 * recipe.rank}, target_modules: all-linear}}}}"
    )
    lines = [
        f"# {comments['head']}",
        "# Written by `lora-lightning init`; change what you like; `lora-lightning fit --help` lists more.",
        "seed_everything: 0",
        "model:",
        f"  class_path: {choice.task}",
        "  init_args:",
        *_settings({"backbone": backbone}, comments),
        f"    method: {method}  # or DoRA, IA3, BitFit, ...",
        f"    optim: {flow(recipe.optim)}",
        *_settings(recipe.model, comments),
        "data:",
        f"  class_path: {DATA_MODULES[choice.task]}",
        "  init_args:",
        *_settings({"train": sample.source}, comments),
        *([f"    # {comments['labels']}"] if "labels" in comments else []),
        *_settings({**sample.data_settings, **choice.settings, **recipe.data}, comments),
        "trainer:",
        f"  max_epochs: {recipe.epochs}",
        *([f"  accumulate_grad_batches: {recipe.accumulate}"] if recipe.accumulate > 1 else []),
        "  gradient_clip_val: 1.0",
        "  # precision: bf16-mixed  # faster on recent GPUs",
        "  callbacks:",
        f"    - {{class_path: AdapterCheckpoint, init_args: {{monitor: {monitor}, mode: {mode}}}}}  # keeps the best",
    ]
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    """Return a value as YAML on one line.

    Example:
        >>> flow({"a": ["x", "1e-3", True], "lr": 5e-4})
        '{a: [x, "1e-3", true], lr: 5e-4}'
    """
    if isinstance(value, dict):
        return f"{{{', '.join(f'{flow(key)}: {flow(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_A_TEXT:
        return value
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    if 0 < abs(value) < 0.01:
        digits, _, exponent = f"{value:e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return repr(value)


def _settings(settings: dict[str, Any], comments: dict[str, str]) -> list[str]:
    lines = []
    for name, value in settings.items():
        comment = f"  # {comments[name]}" if name in comments else ""
        lines.append(f"    {name}: {flow(value)}{comment}")
    return lines
