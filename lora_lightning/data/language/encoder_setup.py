"""Load a tokenizer for samples, and choose its template, end token, padding and maximum length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.data.language.encoding import Encoder
from lora_lightning.data.model_facts import ModelFacts
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.texts.chat_templates import END_TOKENS, begins_with_bos, chat_template

_USUAL_LENGTH = 2048


def build_encoder(
    name: str,
    facts: ModelFacts,
    *,
    template: str | None,
    saved_template: str | None = None,
    max_length: int | None,
    padding_side: str,
    holds_instructions: Callable[[], bool],
    **settings: Any,  # noqa: ANN401 - those of Encoder
) -> Encoder:
    """Load a tokenizer and choose what the data's settings leave open; each choice is logged.

    Args:
        name: Hub name, folder or `pkg://` path of the tokenizer.
        facts: What is known of the model.
        template: The chat template's name, or None for the saved run's, else the tokenizer's own.
        saved_template: The chat template of the saved run whose model is used, as Jinja; None where there is none.
        max_length: Tokens after which a sample is too long; None means the usual number, or what the model takes.
        padding_side: `right` or `left`.
        holds_instructions: Returns whether the data are instructions, which have a separate template.
        **settings: `too_long`, `train_on` and `template_arguments`; see `Encoder`.

    Raises:
        BackboneError: The tokenizer cannot be loaded.
        ConfigError: The length is beyond what the model takes, or the template does not read one of its arguments.
        DataError: There is no token to pad with.
    """
    tokenizer = load_tokenizer(name)
    tokenizer.padding_side = padding_side
    stop_ids = _settle_end(tokenizer, name, facts)
    _settle_padding(tokenizer, name, facts)
    begins = begins_with_bos(tokenizer)
    if template is None and saved_template is not None:
        tokenizer.chat_template = saved_template
    _settle_template(tokenizer, name, template, begins, holds_instructions)
    most = min(facts.context or int(1e30), tokenizer.model_max_length)
    if max_length is not None and max_length > most:
        raise ConfigError(
            f"max_length is {max_length}, but {name} takes at most {most} tokens; set it to that or less."
        )
    return Encoder(
        tokenizer=tokenizer,
        tokenizer_name=name,
        template=tokenizer.chat_template,
        max_length=max_length or min(_USUAL_LENGTH, most),
        begin=(tokenizer.bos_token_id,) if begins else (),
        end_id=tokenizer.eos_token_id,
        stop_ids=frozenset(stop_ids),
        turn_end_ids=frozenset([*stop_ids, *known_ids(tokenizer, END_TOKENS)]),
        join_plainly=template == "plain",
        vocabulary=facts.vocabulary,
        **settings,
    )


def known_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:  # noqa: ANN401 - tokenizers share no public base
    """Return the ids of those tokens that a tokenizer knows as one."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens if token in vocabulary]


def _settle_end(tokenizer: Any, name: str, facts: ModelFacts) -> list[int]:  # noqa: ANN401 - tokenizers share no public base class
    """Ensure that there is an end token if the model has one; return the tokens at which the model stops."""
    ids = [one for one in (tokenizer.eos_token_id, *facts.end_ids) if one is not None]
    if tokenizer.eos_token_id is None and ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
        rank_zero_info(f"The tokenizer of {name} has no end token; the model's, {tokenizer.eos_token!r}, is learnt.")
    if not ids:
        rank_zero_warn(f"Neither the tokenizer of {name} nor its config has an end token: no answer learns to end.")
    return ids


def _settle_padding(tokenizer: Any, name: str, facts: ModelFacts) -> None:  # noqa: ANN401 - tokenizers share no public base class
    """Make sure that there is a token to pad with, and one that the model knows."""
    if tokenizer.pad_token_id is None:
        why = "no padding token"
    elif facts.vocabulary is not None and tokenizer.pad_token_id >= facts.vocabulary:
        why = f"the padding token {tokenizer.pad_token!r}, which the model does not know"
    else:
        return
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise DataError(f"The tokenizer of {name} has neither a padding token nor an end token to pad with.")
    rank_zero_info(f"The tokenizer of {name} has {why}; {tokenizer.pad_token!r} pads.")


def _settle_template(
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no public base class
    name: str,
    wanted: str | None,
    begins: bool,
    holds_instructions: Callable[[], bool],
) -> None:
    """Give the tokenizer the template that the settings name, or the one of the data's format."""
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.get_chat_template()
    if wanted is None and not tokenizer.chat_template:
        wanted = "alpaca" if holds_instructions() else None
    if wanted is not None:
        tokenizer.chat_template = chat_template(wanted, bos=begins)
    kind = wanted or ("the tokenizer's own" if tokenizer.chat_template else "none")
    rank_zero_info(f"Chat template: {kind}.")
    written = [token for token in END_TOKENS if wanted and token in tokenizer.chat_template]
    if written and not known_ids(tokenizer, written):
        rank_zero_warn(
            f"The template {wanted} writes {written[0]}, which the tokenizer of {name} does not know as one token and "
            "spells out. It can be learnt so, but a template without such tokens (dialogue, alpaca, plain) suits this "
            "model better."
        )
