"""Choose the PEFT type for a model's adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_lightning.adapters import attached_methods
from lora_lightning.adapters.merge import refuse_unmergeable_kinds
from lora_lightning.errors import NotMergeable
from lora_lightning.peft_format.adapter import PeftAdapter
from lora_lightning.peft_format.encode import to_peft, why_not_peft
from lora_lightning.peft_format.kinds.encode import KIND_METHODS, encode_kind, why_no_kind

_MERGE = "Merge it into the base instead (lora-lightning export --to merged)"
_KEEP = "Use the adapter folder beside the checkpoint, which this library reads"


def for_peft(model: nn.Module, state: Mapping[str, Tensor], *, own_kind: bool = False) -> PeftAdapter | None:
    """Describe the adapters of a model for PEFT: as LoRA or DoRA, or as another kind that PEFT has.

    Args:
        model: A model with adapters.
        state: Result of `folded_state_dict`.
        own_kind: Describe AdaLoRA and VeRA as PEFT's types of these names, and not as the equivalent LoRA.

    Returns:
        Config and tensors; None if PEFT cannot express them (`why_not_for_peft` returns the reason).
    """
    if own_kind:
        return encode_kind(model, state, relatives=True) or for_peft(model, state)
    return to_peft(model, state) or to_peft(model, state, as_lora=True) or encode_kind(model, state)


def why_not_for_peft(model: nn.Module) -> str:
    """Return the reason why `for_peft` returns None, and what to do, as the end of a sentence."""
    methods = attached_methods(model)
    if len(methods) == 1 and type(methods[0]) in KIND_METHODS:
        reason = why_no_kind(model)
        if reason is not None:
            return f"{reason}. {_KEEP}"
    return f"{why_not_peft(model)}. {_MERGE if _is_mergeable(model) else _KEEP}"


def _is_mergeable(model: nn.Module) -> bool:
    """Return whether a model's adapters can be folded into a dense base."""
    try:
        refuse_unmergeable_kinds(model)
    except NotMergeable:
        return False
    return True
