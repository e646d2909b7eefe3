"""LoftQ: start low-rank adapters at the best correction of what quantizing took away."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones.load import quiet
from lora_lightning.errors import BackboneError
from lora_lightning.methods.low_rank import LowRankAdapter
from lora_lightning.methods.starts import principal_part


@torch.no_grad()
def start_at_quantization_error(model: nn.Module, name: str | None = None) -> None:
    """Set s B A of each adapter with `init="loftq"` to the best rank-r approximation of W - Q.

    W is the weight in the model's files, which are read once more for it, in full precision on the CPU; Q is what the
    quantized layer stands for. This is the first iteration of Li et al. 2023 (arXiv 2310.08659, algorithm 1) from A and
    B of zero: Q stays as it was loaded, so `disabled` gives the quantized base. Adapters without weights (on the meta
    device) are left alone.

    Args:
        model: A quantized transformers model with adapters.
        name: The name of the adapters to set; None for all.

    Raises:
        BackboneError: The dense weights cannot be read.
    """
    waiting = [
        (path, host, adapter)
        for path, host, adapter in iter_adapters(model, name)
        if isinstance(adapter, LowRankAdapter) and adapter.init == "loftq" and not adapter.lora_A.is_meta
    ]
    if not waiting:
        return
    dense, missing = _load_dense(model)
    for path, host, adapter in waiting:
        if f"{path}.weight" in missing:
            raise BackboneError(f"init='loftq': the model's files hold no weight for {path!r}; leave it out.")
        quantized = read_weight(host)
        error = read_weight(dense.get_submodule(path)).to(quantized.device).float() - quantized.float()
        a, b = principal_part(error, adapter.r, adapter.scaling)
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)


def _load_dense(model: Any) -> tuple[nn.Module, set[str]]:  # noqa: ANN401 - a transformers model
    """Load the model's files once more without quantization; return it with the names that they lack."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not source:
        raise BackboneError(
            f"init='loftq' reads the weights from before quantizing, and this {type(model).__name__} does not say "
            "which files it comes from; load it with from_pretrained, or use another init."
        )
    import transformers

    try:
        with quiet(transformers.utils.logging), torch.device("cpu"):
            dense, info = type(model).from_pretrained(
                source, dtype="auto", trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"init='loftq' reads the weights of {source!r} from before quantizing, which failed: {error}"
        ) from error
    return dense, set(info["missing_keys"])
