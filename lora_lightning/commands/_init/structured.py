"""Sentences with tags, and questions with choices."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lora_lightning.commands._init.choice import Choice, Wishes, column_of, named
from lora_lightning.commands._init.columns import Column
from lora_lightning.commands._init.sample import Sample
from lora_lightning.errors import DataError

_WORD_NAMES = ("tokens", "words", "token", "word", "sentence", "text")
_TAG_NAMES = ("ner_tags", "tags", "ner", "labels", "pos_tags", "pos", "chunk_tags", "upos")
_QUESTION_NAMES = ("question", "query", "prompt", "ctx", "context", "sentence", "stem", "text", "premise")
_CHOICES_NAMES = ("choices", "options", "endings", "answers", "candidates", "alternatives")
_ANSWER_NAMES = (
    "answer",
    "label",
    "answerkey",
    "answer_key",
    "correct",
    "correct_answer",
    "target",
    "answer_idx",
    "gold",
)
# Names such as A, choice1, option_b, ending0: a stem that several share, and a number or a letter.
_NUMBERED = re.compile(r"(.*?)[ _-]?(\d|[a-e])", re.IGNORECASE)
_CHOICE_STEMS = ("", "choice", "option", "opt", "ending", "answer", "sol", "alternative", "candidate")


def guess_tagged(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> Choice | None:
    """Find words and a tag for each."""
    if sample.settings.conll:
        if not _are_tags(named(columns, ("tags",))):
            raise DataError(
                f"{sample.source} has no words with a tag each, one a line. If it is running text, save it as "
                'JSON lines with a field text, such as {"text": "..."}.'
            )
        return Choice(task="TokenClassification", seen="one word and its tag a line")
    words = column_of(columns, wishes.text) if wishes.text else _word_column(columns)
    tags = column_of(columns, wishes.label[0]) if wishes.label else None
    if words is None:
        return None
    fitting = [one for one in columns if one is not words and _fit(words, one)]
    tags = tags or named(fitting, _TAG_NAMES) or next(iter(fitting), None)
    if tags is None or tags not in fitting:
        return None
    settings = {"token_column": words.name, "tag_column": tags.name}
    seen = f"lists of words in {words.name!r}, a tag for each in {tags.name!r}"
    return Choice(task="TokenClassification", settings=settings, seen=seen)


def _are_tags(column: Column | None) -> bool:
    """Return whether the entries of the lists of a column repeat, as the last words of lines of a text do not."""
    if column is None:
        return False
    tags = [tag for cell in column.filled for tag in cell]
    return len(set(tags)) <= len(tags) / 2


def _word_column(columns: Sequence[Column]) -> Column | None:
    lists = [column for column in columns if column.are_lists]
    return named(lists, _WORD_NAMES)


def _fit(words: Column, tags: Column) -> bool:
    """Return whether a column has as many entries as another in nearly every row."""
    if not tags.are_lists:
        return False
    lengths = [len(cell) if isinstance(cell, list) else -1 for cell in tags.cells]
    same = sum(
        isinstance(cell, list) and len(cell) == length for cell, length in zip(words.cells, lengths, strict=True)
    )
    return same >= 0.9 * len(words.filled)


def guess_choices(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> Choice | None:
    """Find a question, its choices and the correct one."""
    del sample
    choices = _choices_column(columns)
    choice_columns = [] if choices is not None else _choice_columns(columns)
    others = [one for one in columns if one is not choices and one not in choice_columns]
    answer = column_of(columns, wishes.label[0]) if wishes.label else named(others, _ANSWER_NAMES)
    texts = [one for one in others if one.is_text and one is not answer]
    question = column_of(columns, wishes.text) if wishes.text else named(texts, _QUESTION_NAMES)
    if answer is None or question is None or (choices is None and not choice_columns):
        return None
    names: Any = choices.name if choices is not None else [column.name for column in choice_columns]
    settings = {"question_column": question.name, "choices_column": names, "label_column": answer.name}
    shown = repr(names) if isinstance(names, str) else ", ".join(map(repr, names))
    seen = f"questions in {question.name!r}, choices in {shown}, the right one in {answer.name!r}"
    return Choice(task="MultipleChoice", settings=settings, seen=seen)


def _choices_column(columns: Sequence[Column]) -> Column | None:
    """Return the column with lists of choices, which data sets on the Hub also keep in objects."""
    found = named(columns, _CHOICES_NAMES)
    if found is None:
        return None
    is_list = all(isinstance(cell, list) and len(cell) > 1 for cell in found.filled)
    is_object = all(isinstance(cell, dict) and "text" in cell for cell in found.filled)
    return found if is_list or is_object else None


def _choice_columns(columns: Sequence[Column]) -> list[Column]:
    """Return columns whose names differ in a number or a letter, one for each choice."""
    by_stem: dict[str, list[Column]] = defaultdict(list)
    for column in columns:
        match = _NUMBERED.fullmatch(column.name)
        if match and match[1].lower() in _CHOICE_STEMS:
            by_stem[match[1].lower()].append(column)
    return next((found for found in by_stem.values() if len(found) > 1), [])
