"""Take adapters off a model."""

from __future__ import annotations

from torch import nn

from lora_lightning.adapters.calls import end_watch
from lora_lightning.adapters.frozen import release_modes
from lora_lightning.adapters.host import unhang
from lora_lightning.adapters.selection.checkpointing import unfollow_selection
from lora_lightning.adapters.walk import RECORD, Attachment, iter_hosts, refuse_sharded, unwrap

__all__ = ["detach"]


def detach(model: nn.Module) -> None:
    """Take all adapters off a model, which is then exactly as before `attach`, `requires_grad` included.

    Raises:
        TargetError: The model is sharded.
    """
    refuse_sharded(model, "detach")
    release_modes(unwrap(model))
    for _, host in list(iter_hosts(model)):
        unhang(host)
    unfollow_selection(unwrap(model))
    for module in unwrap(model).modules():  # adapters may have been attached to a part of the model
        record: Attachment | None = module.__dict__.pop(RECORD, None)
        if record is None:
            continue
        end_watch(module)
        if record.unroute is not None:
            record.unroute(module)
        for name in record.was_trainable:
            module.get_parameter(name).requires_grad_()
        for path in record.nested_encoders:
            module.get_submodule(path).use_nested_tensor = True  # type: ignore[assignment]  # an nn.TransformerEncoder
