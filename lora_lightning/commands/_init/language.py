"""Conversations, prompts with answers, pairs of texts and plain texts, for generative models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_lightning.commands._init.choice import Choice, Wishes, column_of, named
from lora_lightning.commands._init.columns import Column, words
from lora_lightning.commands._init.labelled import TEXT_NAMES, has_sure_label
from lora_lightning.commands._init.sample import Sample
from lora_lightning.errors import DataError

_CONVERSATIONS = {
    ("messages",): "conversations in 'messages'",
    ("conversations",): "conversations in 'conversations'",
    ("prompt", "completion"): "prompts with completions",
    ("instruction", "output"): "instructions with outputs (Alpaca)",
    ("dialogue",): "dialogues",
}
_OTHER_TURNS = ("conversation", "dialog", "turns", "chat", "message")
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "user", "human")
_ANSWERS = ("completion", "response", "answer", "output", "reply", "assistant", "chosen")
_SOURCES = (
    "source",
    "src",
    "document",
    "article",
    "dialogue",
    "original",
    "input_text",
    "source_text",
    "text",
    "body",
    "sentence",
)
_TARGETS = (
    *("target", "tgt", "summary", "highlights", "translation", "target_text", "output_text", "abstract", "headline"),
    *("simplified", "corrected", "correction", "paraphrase"),
)
_LANGUAGES = words(
    "ar bg cs da de el en es et fa fi fr he hi hu id it ja ko lt lv nl no pl pt ro ru sk sl sv tr uk vi zh"
)
_WORDS_OF_A_TEXT = 2
_PLAIN_NAMES = ("text", "content", "document", "body")


def guess_conversation(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> Choice | None:
    """Find the fields of a conversation, of a prompt with its answer, or of plain text."""
    if wishes.task is None and (wishes.text or wishes.label):
        return None
    names = {column.name for column in columns}
    shape = next((shape for shape in _CONVERSATIONS if names >= set(shape)), None)
    if shape is not None and not (wishes.text or wishes.label):
        has_turns = len(shape) == 1
        return Choice(task="CausalLM", seen=_CONVERSATIONS[shape], has_turns=has_turns)
    turns = named(columns, _OTHER_TURNS)
    if turns is not None and all(_are_turns(cell) for cell in turns.filled):
        seen = f"conversations in {turns.name!r}"
        return Choice(task="CausalLM", settings=_renamed(messages=turns), seen=seen, has_turns=True)
    return _asked(sample, columns, wishes) if wishes.task == "CausalLM" else None


def _asked(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> Choice | None:
    """Return the choice of a causal language model, if the user wants one."""
    source, target = _pair(columns, wishes)
    if source is not None and target is not None:
        return _as_prompts(source, target)
    return guess_plain_text(sample, columns, wishes)


def guess_pairs(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> Choice | None:
    """Find source texts and target texts.

    Raises:
        DataError: Translations are in one column of objects.
    """
    _refuse_nested(sample, columns)
    source, target = _pair(columns, wishes)
    if source is None or target is None:
        return None
    if wishes.task is None and (not _is_written(target) or has_sure_label(columns)):
        return None
    is_asked = source.name.lower() in _PROMPTS and target.name.lower() in _ANSWERS
    is_causal = wishes.architecture == "decoder" or (is_asked and wishes.architecture != "encoder-decoder")
    if wishes.task is None and is_causal:
        return _as_prompts(source, target)
    settings = {"source_column": source.name, "target_column": target.name}
    seen = f"texts in {source.name!r}, texts to write in {target.name!r}"
    return Choice(task="Seq2SeqLM", settings=settings, seen=seen)


def guess_plain_text(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> Choice | None:
    """Find plain texts."""
    del sample
    texts = [column for column in columns if column.is_text and column.is_content]
    names = _PLAIN_NAMES if wishes.task is None else TEXT_NAMES
    text = column_of(columns, wishes.text) if wishes.text else named(texts, names)
    if text is None and len(texts) == 1:
        text = texts[0]
    # Objects beside a text, such as the answers of a question, say that there is more to learn.
    has_objects = wishes.task is None and any(isinstance(cell, dict) for one in columns for cell in one.filled)
    if text is None or wishes.label or has_objects:
        return None
    return Choice(task="CausalLM", settings=_renamed(text=text), seen=f"plain texts in {text.name!r}")


def _pair(columns: Sequence[Column], wishes: Wishes) -> tuple[Column | None, Column | None]:
    """Return the columns of sources and of targets."""
    if wishes.text and wishes.label:
        return column_of(columns, wishes.text), column_of(columns, wishes.label[0])
    texts = [column for column in columns if column.is_text]
    for sources, targets in ((_PROMPTS, _ANSWERS), (_SOURCES, _TARGETS)):
        source = column_of(columns, wishes.text) if wishes.text else named(texts, sources)
        target = column_of(columns, wishes.label[0]) if wishes.label else named(texts, targets)
        if source is not None and target is not None and source is not target:
            return source, target
    languages = [column for column in texts if column.name.lower() in _LANGUAGES]
    return (languages[0], languages[1]) if len(languages) == 2 and len(columns) <= 3 else (None, None)


def _is_written(target: Column) -> bool:
    """Return whether the cells of a column are texts, not labels."""
    return target.mean_words >= _WORDS_OF_A_TEXT or target.share_different > 1 / 2


def _as_prompts(source: Column, target: Column) -> Choice:
    settings = _renamed(prompt=source, completion=target)
    seen = f"prompts in {source.name!r}, answers in {target.name!r}"
    return Choice(task="CausalLM", settings=settings, seen=seen)


def _renamed(**columns: Column) -> dict[str, Any]:
    """Return the setting that maps fields to our names."""
    names = {ours: column.name for ours, column in columns.items() if column.name != ours}
    return {"columns": names} if names else {}


def _refuse_nested(sample: Sample, columns: Sequence[Column]) -> None:
    nested = named(columns, ("translation",))
    if nested is not None and all(isinstance(cell, dict) for cell in nested.filled):
        inside = ", ".join(nested.filled[0])
        raise DataError(
            f"{sample.source}: the column {nested.name!r} holds objects ({inside}); save each language in a column of "
            "its own, and name them with --text_column and --label_column."
        )


def _are_turns(cell: Any) -> bool:  # noqa: ANN401 - whatever a record holds
    return isinstance(cell, list) and bool(cell) and all(isinstance(one, dict) for one in cell)
