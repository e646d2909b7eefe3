"""Modules that are trained as full copies, and modules that PEFT would copy in addition."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lora_lightning.adapters import Adapter, Role, iter_adapters

# PEFT picks its wrapper by `task_type`; for classifiers that wrapper adds names of its own to `modules_to_save`.
_TASK_TYPES: Mapping[str, str] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_HANDED_ON = ("input_ids", "inputs_embeds")
_HANDED_TO_DECODERS = ("decoder_input_ids", "decoder_inputs_embeds")
"""What the wrappers hand on by name, whether it was given or not; other models take PEFT's general wrapper alone."""
_ADDED_BY_TASK_TYPE: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def is_copy(adapter: Adapter) -> bool:
    """Return whether an adapter is a module trained as a full copy, such as a head."""
    return {role for _, _, role in adapter.named_roles()} == {Role.HEAD}


def copies_of(model: nn.Module) -> list[str]:
    """Return the paths of the modules that are trained as full copies."""
    return [path for path, _, adapter in iter_adapters(model) if is_copy(adapter)]


def extra_copies(
    paths: Sequence[str], heads: Sequence[str], hosts: Collection[str], task_type: str | None
) -> list[str] | None:
    """Return the modules that PEFT would copy in addition to our heads, or None if its matching breaks our adapters.

    PEFT copies every module whose path ends with one of the names, even without a dot before it, so that `classifier`
    matches `pre_classifier` too; and it skips targets that have one of the names in their path.

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
    """Return the `task_type` by which PEFT selects its wrapper for a transformers model; None for the general one.

    A wrapper must pass only arguments that the model's forward accepts; a model of only audio or images gets none.
    """
    if not hasattr(model, "config"):
        return None
    names = [cls.__name__ for cls in type(model).__mro__]
    kind = next((kind for suffix, kind in _TASK_TYPES.items() if any(n.endswith(suffix) for n in names)), None)
    if kind == "SEQ_2_SEQ_LM" and not getattr(model.config, "is_encoder_decoder", False):
        kind = "CAUSAL_LM"  # models of images and text generate behind their input
    handed_on = _HANDED_ON + (_HANDED_TO_DECODERS if kind == "SEQ_2_SEQ_LM" else ())
    taken = inspect.signature(model.forward).parameters
    return kind if all(name in taken for name in handed_on) else None
