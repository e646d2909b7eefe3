"""Tokenizers of encoders: loading, checks of the maximum length, padding, and tokenization in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.errors import ConfigError, DataError


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, or of a piece of it.

    Args:
        ids: The token ids.
        type_ids: The segment of each token; empty where the tokenizer tells none.
        word_ids: The index of each token's word, None for tokens of no word; empty for a slow tokenizer.
    """

    ids: list[int]
    type_ids: list[int]
    word_ids: list[int | None]


def padding_tokenizer(name: str, max_length: int, *, of_words: bool = False) -> Any:  # noqa: ANN401 - tokenizers share no public base class
    """Load a tokenizer and ensure that it can pad.

    Args:
        name: Hub name, folder or `pkg://` path of the tokenizer.
        max_length: Maximum number of tokens of a text.
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


def tokenizer_key(tokenizer: Any) -> str:  # noqa: ANN401 - as padding_tokenizer
    """Return a digest of everything that determines how a tokenizer encodes a text."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        # Each call sets these two, so that they carry no information.
        backend.no_truncation()
        backend.no_padding()
        inner = backend.to_str()
    else:
        inner = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    names = ("model_input_names", "padding_side", "truncation_side", "chat_template", "special_tokens_map")
    outer = [type(tokenizer).__name__, *(getattr(tokenizer, name, None) for name in names)]
    settings = json.dumps([outer, repr(tokenizer)], sort_keys=True, default=str)
    return hashlib.sha256(f"{settings}\n{inner}".encode()).hexdigest()


def tokenize(
    tokenizer: Any,  # noqa: ANN401 - as padding_tokenizer
    texts: Sequence[Any],
    max_length: int,
    *,
    strategy: str = "longest_first",
    of_words: bool = False,
) -> list[list[Tokens]]:
    """Return for each text its tokens, in pieces of at most `max_length`.

    Args:
        tokenizer: The tokenizer.
        texts: Texts, pairs of texts, or with `of_words` lists of words.
        max_length: Tokens in a piece.
        strategy: What is shortened of a pair, as transformers names it.
        of_words: Whether texts are lists of words.
    """
    if not tokenizer.is_fast:
        return [_from_slow(tokenizer, text, max_length, strategy) for text in texts]
    from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

    tokenizer.set_truncation_and_padding(
        PaddingStrategy.DO_NOT_PAD, TruncationStrategy(strategy), max_length, 0, None, None
    )
    # Twice as fast as calling the tokenizer, which also makes Python lists of what is not needed here. The fast variant
    # does not tell which word a token belongs to.
    backend = tokenizer.backend_tokenizer
    encode = backend.encode_batch if of_words else backend.encode_batch_fast
    encodings = encode(texts, is_pretokenized=of_words)
    has_types = "token_type_ids" in tokenizer.model_input_names
    return [
        [_from_fast(piece, has_types=has_types, of_words=of_words) for piece in (one, *one.overflowing)]
        for one in encodings
    ]


def tell_too_long(
    lost: Mapping[str, int], num_rows: int, whose: str, max_length: int | str, setting: str = "max_length"
) -> None:
    """Warn once of the rows of a split that are longer than the maximum.

    Args:
        lost: How many were `cut`, `dropped` or `split`.
        num_rows: How many rows there are.
        whose: The split and its source.
        max_length: The maximum, or what there is of them.
        setting: The setting that names it.
    """
    for name, did in (("cut", "cut at it"), ("dropped", "left out"), ("split", "split into pieces")):
        if lost.get(name):
            rank_zero_warn(
                f"{lost[name]} of {num_rows} {whose} are longer than {max_length} tokens and were {did}. Set a larger "
                f"{setting} to keep them whole, or too_long to do otherwise."
            )


def _from_fast(piece: Any, *, has_types: bool, of_words: bool) -> Tokens:  # noqa: ANN401 - the tokenizers package's class
    return Tokens(piece.ids, piece.type_ids if has_types else [], piece.word_ids if of_words else [])


def _from_slow(tokenizer: Any, text: Any, max_length: int, strategy: str) -> list[Tokens]:  # noqa: ANN401 - as padding_tokenizer
    parts = text if isinstance(text, tuple) else (text,)
    encoded = tokenizer(*parts, truncation=strategy, max_length=max_length)
    first = Tokens(encoded["input_ids"], encoded.get("token_type_ids", []), [])
    # A slow tokenizer does not tell what it cuts.
    rest = tokenizer(*parts)["input_ids"][len(first.ids) :]
    starts = range(0, len(rest), max_length)
    return [first, *(Tokens(rest[start : start + max_length], [], []) for start in starts)]
