"""The `adapter_config.json` of PEFT, for every type of adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.kinds.adalora import parse_adalora
from lora_lightning.peft_format.kinds.ia3 import parse_ia3
from lora_lightning.peft_format.kinds.prefix import parse_prefix
from lora_lightning.peft_format.kinds.prompts import parse_p_tuning, parse_prompt_tuning
from lora_lightning.peft_format.kinds.tokens import parse_tokens
from lora_lightning.peft_format.kinds.vera import parse_vera
from lora_lightning.peft_format.lora.config import parse_lora
from lora_lightning.peft_format.names import CONFIG_NAME as CONFIG_NAME
from lora_lightning.peft_format.names import PEFT_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from lora_lightning.peft_format.schema.targets import PeftConfig as PeftConfig

KINDS: Mapping[str, Callable[[Mapping[str, Any], str], PeftConfig]] = {
    "LORA": parse_lora,
    "ADALORA": parse_adalora,
    "VERA": parse_vera,
    "IA3": parse_ia3,
    "PROMPT_TUNING": parse_prompt_tuning,
    "P_TUNING": parse_p_tuning,
    "PREFIX_TUNING": parse_prefix,
    "TRAINABLE_TOKENS": parse_tokens,
}
"""The supported types of PEFT, by their `peft_type`."""


def parse_peft_config(data: Mapping[str, Any], source: str = CONFIG_NAME) -> PeftConfig:
    """Check the content of an `adapter_config.json`.

    Args:
        data: The JSON object.
        source: Where it came from, for messages.

    Raises:
        CheckpointError: Its type is not supported, or it uses an option that this library does not compute.
    """
    kind = data.get("peft_type")
    parse = KINDS.get(kind) if isinstance(kind, str) else None
    if parse is None:
        raise CheckpointError(
            f"{source}: peft_type is {kind!r}, and of PEFT's adapters this library reads {', '.join(KINDS)} (DoRA is "
            "one of LORA)."
        )
    return parse(data, source)
