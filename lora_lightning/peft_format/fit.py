"""Match an adapter in PEFT's format with a model: the methods to attach, and the tensors by our names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import CheckpointError, UserError
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.kinds.adalora import AdaLoraConfig, fit_adalora
from lora_lightning.peft_format.kinds.ia3 import Ia3Config, fit_ia3
from lora_lightning.peft_format.kinds.prefix import PrefixConfig, fit_prefix
from lora_lightning.peft_format.kinds.prompts import PromptConfig, fit_prompt
from lora_lightning.peft_format.kinds.tokens import TokensConfig, fit_tokens
from lora_lightning.peft_format.kinds.vera import VeraConfig, fit_vera
from lora_lightning.peft_format.lora.config import LoraConfig
from lora_lightning.peft_format.lora.fit import fit_lora
from lora_lightning.peft_format.schema.targets import PeftConfig

_FITS: Mapping[type[PeftConfig], Any] = {
    LoraConfig: fit_lora,
    AdaLoraConfig: fit_adalora,
    VeraConfig: fit_vera,
    Ia3Config: fit_ia3,
    PromptConfig: fit_prompt,
    PrefixConfig: fit_prefix,
    TokensConfig: fit_tokens,
}


def fit_to_model(model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Convert an adapter in PEFT's format for one model, without changing the model.

    Args:
        model: The bare model.
        config: The adapter's `adapter_config.json`.
        tensors: The adapter's tensors by PEFT's key names.
        source: Where the adapter came from, for messages.

    Raises:
        CheckpointError: Keys or tensors do not fit the config or the model.
    """
    _warn_of_other_base(model, config, source)
    fitted: FittedAdapter
    try:
        fitted = _FITS[type(config)](model, config, tensors, source)
    except CheckpointError:
        raise
    except UserError as error:  # the model cannot take the method
        raise CheckpointError(f"{source}: {error}") from error
    return fitted


def _warn_of_other_base(model: nn.Module, config: PeftConfig, source: str) -> None:
    """Warn if the adapter names another base; only the last part of the path counts, since folders move."""
    here = getattr(getattr(model, "config", None), "_name_or_path", None)
    names = [PurePosixPath(str(name).replace("\\", "/")).name.lower() for name in (here, config.base) if name]
    if len(names) == 2 and names[0] != names[1]:
        warnings.warn(
            f"{source} names {config.base!r} as its base, and this model came from {here!r}: the shapes are compared, "
            "the base's weights only if this library wrote the folder.",
            stacklevel=5,
        )
