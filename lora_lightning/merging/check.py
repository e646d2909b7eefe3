"""Load a merged folder again, and compare it with the model that was written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lightning.errors import CheckpointError
from lora_lightning.merging.probe import outputs

_SHOWN = 3


@torch.no_grad()
def check_written(folder: Path, model: nn.Module, batch: Mapping[str, Tensor] | None, weights_name: str) -> None:
    """Refuse a folder that does not load as the model that was written to it.

    Libraries tie, rename and convert weights during saving and loading. Errors there only show in the loaded model.

    Args:
        folder: The folder.
        model: The merged model, as it was written.
        batch: Input for both models; None compares only the weights.
        weights_name: The file of a model that has no `save_pretrained`.

    Raises:
        CheckpointError: A weight or an answer differs.
    """
    if not hasattr(model, "save_pretrained"):
        _compare(model.state_dict(), load_file(folder / weights_name))
        return
    try:
        again = _load(folder, model)
    except Exception as error:  # a class of the user's own may need more than a folder
        warnings.warn(f"The merged folder was not checked, since it could not be loaded: {error}", stacklevel=3)
        return
    _compare(model.state_dict(), again.state_dict())
    if batch is not None:
        answer, expected = outputs(again, dict(batch)), outputs(model, dict(batch))
        if not torch.allclose(answer, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), equal_nan=True):
            raise _differs(f"its outputs are off by {float((answer - expected).abs().max()):.2g} on a sample")


def _load(folder: Path, model: Any) -> nn.Module:  # noqa: ANN401 - a transformers model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever transformers has to say of the model was said when it was loaded
        again: nn.Module = type(model).from_pretrained(folder, dtype="auto", attn_implementation=_attention(model))
    return again


def _attention(model: Any) -> str | None:  # noqa: ANN401 - a transformers model
    return getattr(model.config, "_attn_implementation", None)


def _compare(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    missing = sorted(written.keys() - read.keys())
    if missing:
        raise _differs(f"it lacks {', '.join(missing[:_SHOWN])}")
    other = [name for name, tensor in written.items() if not _is_same(tensor, read[name])]
    if other:
        raise _differs(f"{len(other)} weights differ, such as {', '.join(other[:_SHOWN])}")


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one.cpu(), other.cpu().to(one.dtype)))


def _differs(what: str) -> CheckpointError:
    return CheckpointError(
        f"The merged model does not come back as it was written: loaded from its folder, {what}. Nothing is left "
        "there. Please report this with the model's class; until then, keep the adapter apart (export --to peft)."
    )
