"""What a fine-tuned module's checkpoint holds beside Lightning's own: the methods, and digests of what is frozen."""

from __future__ import annotations

from typing import Any

import lightning as L

from lora_lightning.checkpoint.fingerprint import check_fingerprint
from lora_lightning.checkpoint.folder import check_methods
from lora_lightning.checkpoint.manifest import class_config
from lora_lightning.errors import CheckpointError
from lora_lightning.finetuning.parts import attach_parts
from lora_lightning.finetuning.record import ENTRY, RECORD, Finetuning, Part, attached_parts, record_of


def write(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add the entry to a checkpoint whose states are reduced already."""
    record = record_of(module)
    assert record is not None
    held = checkpoint["state_dict"]
    checkpoint[ENTRY] = {
        "parts": [part.plain(module) for part, _ in attached_parts(module)],
        "frozen": {name: digest for name, digest in record.frozen.items() if name not in held},
        "task": f"{type(module).__module__}.{type(module).__qualname__}",
    }


def read(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Compare a checkpoint's entry with a module, and give the methods back what they carried along.

    A module that has no adapters yet gets those that the entry describes.

    Raises:
        CheckpointError: The entry is missing, names other adapters, or was written beside other frozen weights.
    """
    found = checkpoint.get(ENTRY)
    plain = found.get("parts") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(plain, list):
        raise CheckpointError(
            "This checkpoint holds no adapters: it was saved without AdapterFinetuning. To start from its weights, "
            "load them where the module creates its submodule; to test them, leave the callback out."
        )
    stored = [Part.from_plain(one) for one in plain]
    if record_of(module) is None:
        later = [part.path for part in stored if not part.exists_in(module)]
        if later:
            raise CheckpointError(
                f"{type(module).__name__} has no submodule {later[0]!r} after __init__ and configure_model. Create it "
                "in one of these: setup is called by a Trainer only."
            )
        module.__dict__[RECORD] = Finetuning(parts=stored)
        attach_parts(module)
    _compare_methods(module, stored)
    _compare_frozen(module, plain, found)
    for (part, submodule), one in zip(attached_parts(module), plain, strict=True):
        part.num_steps = int(one["num_steps"])
        for method, state in zip(part.methods, one["method_state"], strict=True):
            method.load_extra_state(submodule, state)


def _compare_methods(module: L.LightningModule, stored: list[Part]) -> None:
    """Refuse a checkpoint of other adapters."""
    here = [part for part, _ in attached_parts(module)]
    if [part.path for part in here] != [part.path for part in stored]:
        theirs = ", ".join(part.name for part in stored)
        own = ", ".join(part.name for part in here) or "none"
        raise CheckpointError(
            f"The checkpoint holds adapters of {theirs}, and this module has adapters of {own}. Give AdapterFinetuning "
            "the submodule that it was trained with."
        )
    for part, other in zip(here, stored, strict=True):
        check_methods(part.methods, [class_config(method) for method in other.methods], "The checkpoint")


def _compare_frozen(module: L.LightningModule, plain: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Refuse a checkpoint that was trained beside other frozen weights, which it does not hold."""
    record = record_of(module)
    assert record is not None
    for (part, _), one in zip(attached_parts(module), plain, strict=True):
        source = f"The checkpoint's adapter of {part.name}"
        check_fingerprint(str(part.base_fingerprint), str(one["base_fingerprint"]), source)
        if part.frozen_digest != one["frozen_digest"]:
            raise CheckpointError(_other_weights(f"in {part.name}"))
    held = checkpoint_names(found)
    other = [name for name, digest in held.items() if record.frozen.get(name, digest) != digest]
    if other:
        raise CheckpointError(_other_weights(f"outside the adapted submodules, such as {other[0]!r},"))


def checkpoint_names(found: dict[str, Any]) -> dict[str, str]:
    """Return the digests of the frozen parameters that a checkpoint does not hold."""
    frozen = found.get("frozen")
    return frozen if isinstance(frozen, dict) else {}


def _other_weights(where: str) -> str:
    return (
        f"The checkpoint was trained beside other frozen weights {where} than this module has, and it does not hold "
        "them. Load the weights that it was trained beside; if they are random, seed them where they are created."
    )
