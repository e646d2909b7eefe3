"""The tokenizer of a training: what a checkpoint keeps of it, so that the model is asked later as it was trained."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.backbones.tokenizer_identity import check_tokenizer, tokenizer_fingerprint
from lora_lightning.errors import CheckpointError
from lora_lightning.texts.chat_templates import begins_with_bos, chat_template

PLAINLY_JOINED = "plain"
"""The template's name under which prompts and completions are joined without any frame."""

TOKENIZER_CONFIG = "tokenizer_config.json"

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_OPTIONS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_FILES: WeakKeyDictionary[Any, tuple[str | None, dict[str, bytes]]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class SavedTokenizer:
    """A tokenizer, as a training used it.

    Args:
        name: Hub name, folder or `pkg://` path that it was loaded from, or None.
        fingerprint: Digest of its vocabulary, or None if it has none to read.
        chat_template: The chat template as Jinja, with the training's own arguments as defaults, or None.
        template_name: Name of the chat template, in checkpoints that keep no Jinja.
        answers: Whether the training taught to answer messages; None if it did where there is a chat template.
        special_tokens: Its special tokens by transformers' names, such as `eos_token`.
        added_tokens: The tokens beyond its vocabulary in the order of their ids, each with transformers' options.
    """

    name: str | None = None
    fingerprint: str | None = None
    chat_template: str | None = None
    template_name: str | None = None
    answers: bool | None = False
    special_tokens: dict[str, str] = field(default_factory=dict)
    added_tokens: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of_data(cls, data: object, backbone: str | None) -> SavedTokenizer | None:
        """Describe the tokenizer of a data module; None if it has none.

        Args:
            data: The data module, set up. Of a data module of this library, `template` and `template_arguments` count.
            backbone: What the tokenizer was loaded from, if the data module names none.
        """
        tokenizer: Any = getattr(data, "tokenizer", None)
        if not hasattr(tokenizer, "get_vocab"):
            return None
        template = _template_of(tokenizer)
        arguments = getattr(data, "template_arguments", None) or {}
        is_chat = hasattr(data, "template") and data.template != PLAINLY_JOINED
        name = getattr(data, "tokenizer_name", None) or backbone or getattr(tokenizer, "name_or_path", None)
        return cls(
            name=name if isinstance(name, str) and name else None,
            fingerprint=tokenizer_fingerprint(tokenizer),
            chat_template=None if template is None else with_defaults(template, arguments),
            answers=is_chat and template is not None,
            special_tokens={
                key: str(token) for key in _SPECIAL if (token := getattr(tokenizer, key, None)) is not None
            },
            added_tokens=_added_tokens(tokenizer),
        )

    @classmethod
    def from_settings(cls, settings: object, backbone: str | None, fingerprint: str | None) -> SavedTokenizer:
        """Return what the settings of a data module tell, for checkpoints that keep nothing else.

        Args:
            settings: The `datamodule_hyper_parameters` of the checkpoint; anything but a mapping tells nothing.
            backbone: The backbone's name.
            fingerprint: Digest of the vocabulary, if the checkpoint holds it.
        """
        known = settings if isinstance(settings, Mapping) else {}
        template = known.get("template")
        name = known.get("tokenizer") or backbone
        return cls(
            name=name if isinstance(name, str) else None,
            fingerprint=fingerprint,
            template_name=template if isinstance(template, str) else None,
            answers=template != PLAINLY_JOINED if template else (None if "template" in known else False),
        )

    @classmethod
    def from_plain(cls, data: object, source: str) -> SavedTokenizer:
        """Check and build what `plain` gave.

        Raises:
            CheckpointError: It was changed since it was written.
        """
        problem = why_not_plain(data)
        if problem is not None:
            raise CheckpointError(f"{source}: tokenizer {problem}; use another checkpoint.")
        assert isinstance(data, Mapping)
        return cls(**data)

    def plain(self) -> dict[str, Any]:
        """Return it as plain types, for checkpoints and manifests."""
        return asdict(self)

    def load(self, source: str, *, name: str | None = None) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Load the tokenizer and make it what it was in the training.

        Args:
            source: The run, for messages.
            name: Where to load it from; None takes its own name.

        Raises:
            BackboneError: It cannot be loaded.
            CheckpointError: No name is known, or its vocabulary is not that of the training.
        """
        name = name or self.name
        if name is None:
            raise CheckpointError(f"{source} names no backbone and no tokenizer, so texts cannot become tokens.")
        tokenizer = load_tokenizer(name)
        self._add_tokens(tokenizer)
        check_tokenizer(tokenizer, self.fingerprint, source)
        for key, token in self.special_tokens.items():
            if getattr(tokenizer, key, None) != token:
                setattr(tokenizer, key, token)
        template = self.chat_template
        if template is None and self.template_name is not None:
            template = chat_template(self.template_name, bos=begins_with_bos(tokenizer))
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer

    def answers_with(self, tokenizer: Any) -> bool:  # noqa: ANN401 - tokenizers share no public base class
        """Return whether the training taught to answer messages, given its tokenizer."""
        return bool(tokenizer.chat_template) if self.answers is None else self.answers

    def _add_tokens(self, tokenizer: Any) -> None:  # noqa: ANN401 - tokenizers share no public base class
        from transformers import AddedToken

        known = tokenizer.get_vocab()
        missing = [AddedToken(**one) for one in self.added_tokens if one["content"] not in known]
        if missing:
            tokenizer.add_tokens(missing)


def why_not_plain(data: object) -> str | None:
    """Return what keeps data from being a plain `SavedTokenizer`, as the end of a sentence, or None."""
    if not isinstance(data, Mapping):
        return f"must be an object, got {type(data).__name__}"
    unknown = sorted(data.keys() - SavedTokenizer.__dataclass_fields__.keys())
    if unknown:
        return f"holds the unknown {', '.join(map(repr, unknown))}"
    for key in ("name", "fingerprint", "chat_template", "template_name"):
        if not isinstance(data.get(key), str | None):
            return f"holds a {key} that is not a text"
    if not isinstance(data.get("answers"), bool | None):
        return "holds answers that is neither true, false nor null"
    special = data.get("special_tokens", {})
    if not isinstance(special, Mapping) or not all(k in _SPECIAL and isinstance(v, str) for k, v in special.items()):
        return "holds special_tokens that are not texts by transformers' names"
    added = data.get("added_tokens", [])
    if not isinstance(added, list) or not all(_is_token(one) for one in added):
        return "holds added_tokens that are not tokens"
    return None


def tokenizer_files(tokenizer: Any, template: str | None) -> dict[str, bytes]:  # noqa: ANN401 - tokenizers share no public base class
    """Return the files by which transformers loads a tokenizer, by their names.

    Args:
        tokenizer: The tokenizer.
        template: The chat template to write; None writes the tokenizer's own.

    Returns:
        Name -> content; empty for a tokenizer that is not from transformers.
    """
    if not hasattr(tokenizer, "save_pretrained"):
        return {}
    known = _FILES.get(tokenizer)  # a vocabulary takes a moment to write, and each checkpoint asks for it
    if known is None or known[0] != template:
        known = (template, _write_files(tokenizer, template))
        _FILES[tokenizer] = known
    return known[1]


def _write_files(tokenizer: Any, template: str | None) -> dict[str, bytes]:  # noqa: ANN401 - tokenizers share no public base class
    own = copy.deepcopy(tokenizer)
    if getattr(own, "is_fast", False):  # how the data cut and padded their last batch is no part of the tokenizer
        own.backend_tokenizer.no_truncation()
        own.backend_tokenizer.no_padding()
    if template is not None:
        own.chat_template = template
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
        return {path.name: path.read_bytes() for path in files}


def with_defaults(template: str, arguments: Mapping[str, Any]) -> str:
    """Return a chat template that takes some arguments by default, as a training passed them.

    Example:
        >>> with_defaults("{{ 'long' if thinking else 'short' }}", {"thinking": False})
        "{%- set thinking = thinking if thinking is defined else false -%}{{ 'long' if thinking else 'short' }}"
    """
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {_jinja_literal(value)} -%}}"
        for name, value in sorted(arguments.items())
    ]
    return "".join(lines) + template


def end_of_turn(tokenizer: Any) -> int | None:  # noqa: ANN401 - tokenizers share no public base class
    """Return the special token that a tokenizer's chat template puts right after an assistant's words, or None."""
    words = "x"
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # there is none, or it wants other roles; the usual end token will do
        return None
    ids = tokenizer(text.rpartition(words)[2].lstrip(), add_special_tokens=False)["input_ids"]
    first = ids[0] if ids else None
    return first if first in tokenizer.all_special_ids else None


def stop_ids(tokenizer: Any, *, is_chat: bool) -> list[int]:  # noqa: ANN401 - tokenizers share no public base class
    """Return the tokens that end an answer: the tokenizer's end token, and in a chat what ends a turn."""
    ends = [tokenizer.eos_token_id, end_of_turn(tokenizer) if is_chat else None]
    return list(dict.fromkeys(end for end in ends if end is not None))


def _template_of(tokenizer: Any) -> str | None:  # noqa: ANN401 - tokenizers share no public base class
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def _special_tokens(tokenizer: Any) -> dict[str, str]:  # noqa: ANN401 - tokenizers share no public base class
    tokens = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    return {name: str(token) for name, token in tokens.items() if token is not None}


def _added_tokens(tokenizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - tokenizers share no public base class
    """Return the tokens beyond the vocabulary, in the order of their ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [
        {option: getattr(token, option) for option in _TOKEN_OPTIONS}
        for index, token in sorted(added.items())
        if index >= tokenizer.vocab_size
    ]


def _is_token(data: object) -> bool:
    if not isinstance(data, Mapping) or data.keys() - set(_TOKEN_OPTIONS):
        return False
    options = [value for key, value in data.items() if key != "content"]
    return isinstance(data.get("content"), str) and all(isinstance(value, bool) for value in options)


def _jinja_literal(value: Any) -> str:  # noqa: ANN401 - plain settings of any type
    """Return plain data as Jinja writes it: as JSON, but for its null."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        items = [f"{json.dumps(str(key))}: {_jinja_literal(item)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_jinja_literal, value)) + "]"
    return json.dumps(value)
