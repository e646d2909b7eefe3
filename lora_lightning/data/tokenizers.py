"""Tokenizers of encoders: loaded, checked against the length that is asked for, and able to pad."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.errors import ConfigError, DataError


def padding_tokenizer(name: str, max_length: int, *, of_words: bool = False) -> Any:  # noqa: ANN401 - tokenizers share no public base class
    """Load a tokenizer and make sure that it can pad.

    Args:
        name: Hub name, folder or `pkg://` path of the tokenizer.
        max_length: Tokens after which a text is going to be cut.
        of_words: Whether texts are given as lists of words.

    Raises:
        BackboneError: It cannot be loaded.
        ConfigError: The length is beyond what its model takes.
        DataError: There is no token to pad with, or the tokenizer cannot take words.
    """
    tokenizer = load_tokenizer(name)
    if of_words and not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer of {name} ({type(tokenizer).__name__}) does not tell which word a token belongs to; "
            "a fast one is needed (a folder with tokenizer.json)."
        )
    if of_words and getattr(tokenizer, "add_prefix_space", None) is False:
        # Else a byte-level tokenizer (GPT-2, RoBERTa) would run the words of a list together.
        tokenizer = load_tokenizer(name, add_prefix_space=True)
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"max_length is {max_length}, but {name} takes at most {tokenizer.model_max_length} tokens; "
            "set it to that or less."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(f"The tokenizer of {name} has neither a padding token nor an end token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token
        rank_zero_info(f"The tokenizer of {name} has no padding token; its end token {tokenizer.eos_token!r} pads.")
    return tokenizer
