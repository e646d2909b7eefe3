"""Modules that are trained as full copies: which they are, and which ones PEFT copies beyond them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lora_lightning.adapters import Adapter, Role

# PEFT picks its wrapper by `task_type`; for classifiers that wrapper adds names of its own to `modules_to_save`.
_TASK_TYPES: Mapping[str, str] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_ADDED_BY_TASK_TYPE: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}


def is_copy(adapter: Adapter) -> bool:
    """Tell whether an adapter is a module trained as a full copy, such as a head."""
    return {role for _, _, role in adapter.named_roles()} == {Role.HEAD}


def extra_copies(
    paths: Sequence[str], heads: Sequence[str], hosts: Collection[str], task_type: str | None
) -> list[str] | None:
    """Return the modules that PEFT would copy beyond our heads, or None where its matching breaks our adapters.

    PEFT copies every module whose path ends with one of the names, without a dot between, so that `classifier` takes
    `pre_classifier` too; and it leaves out targets that have one of the names in their path.

    Args:
        paths: Paths of all modules.
        heads: Those that are trained as copies.
        hosts: Those with a low-rank adapter.
        task_type: PEFT's `task_type`.
    """
    names = [*heads, *_ADDED_BY_TASK_TYPE.get(task_type, ())]
    if any(prefix.endswith(tuple(names)) for prefix in ("base_model", "base_model.model") if names):
        return None
    if any(re.match(rf"(^|.*\.){name}($|\..*)", host) for name in names for host in hosts):
        return None
    extra = [path for path in paths if path not in heads and any(path.endswith(name) for name in names)]
    taken = [*heads, *hosts]
    nested = any(
        one.startswith(f"{other}.") or other.startswith(f"{one}.") for one in extra for other in [*taken, *extra]
    )
    return None if nested else extra


def task_type_of(model: nn.Module) -> str | None:
    """Return the `task_type` by which PEFT picks its wrapper for a transformers model, or None."""
    if not hasattr(model, "config"):
        return None
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((kind for suffix, kind in _TASK_TYPES.items() if any(n.endswith(suffix) for n in names)), None)
