"""Which tokenizer an adapter was trained with, since other ids for the same words mean nothing to it."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

from lora_lightning.errors import CheckpointError

_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:  # noqa: ANN401 - tokenizers share no public base class
    """Digest the vocabulary of a tokenizer: every token with its id.

    How texts are cut, framed and padded does not count, since data modules set that to their needs.

    Args:
        tokenizer: A tokenizer of transformers, or anything else.

    Returns:
        64 hexadecimal digits, or None where it has no vocabulary to read.
    """
    if not hasattr(tokenizer, "get_vocab"):
        return None
    if tokenizer not in _DIGESTS:  # a quarter of a million tokens take a moment, and each checkpoint asks
        entries = sorted((int(index), str(token)) for token, index in tokenizer.get_vocab().items())
        _DIGESTS[tokenizer] = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return _DIGESTS[tokenizer]


def tokenizer_of(trainer: Any) -> Any:  # noqa: ANN401 - transformers' tokenizers and Lightning's trainer
    """Return the tokenizer of the data that a Trainer runs on, or None without one."""
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def check_tokenizer(tokenizer: Any, expected: str | None, source: str) -> None:  # noqa: ANN401 - transformers' tokenizers and Lightning's trainer
    """Refuse a tokenizer whose vocabulary is not the one that an adapter was trained with.

    Args:
        tokenizer: The tokenizer at hand.
        expected: The fingerprint that was stored with the adapter, or None where none was.
        source: What is being loaded, for the message.

    Raises:
        CheckpointError: The fingerprints differ.
    """
    if expected is None:
        return
    found = tokenizer_fingerprint(tokenizer)
    if found is not None and found != expected:
        raise CheckpointError(
            f"{source} was trained with another tokenizer: its vocabulary has fingerprint {expected[:12]}…, that of "
            f"{getattr(tokenizer, 'name_or_path', None) or 'the one given'} has {found[:12]}…. Use the tokenizer that "
            "it was trained with."
        )
