"""Texts with a label, several labels or a number."""

from __future__ import annotations

from collections.abc import Sequence

from lora_lightning.commands._init.choice import CLASSIFICATION, Choice, Wishes, column_of, named
from lora_lightning.commands._init.columns import Column, words
from lora_lightning.commands._init.sample import Sample
from lora_lightning.data.rows.targets import SEPARATORS
from lora_lightning.errors import DataError

TEXT_NAMES = (
    *("text", "sentence", "review", "review_text", "tweet", "content", "body", "comment", "comment_text", "message"),
    *("post", "document", "utterance", "description", "abstract", "question", "query", "title", "headline"),
)
"""Names of columns with texts, the most specific first."""
_SURE_LABELS = ("label", "labels", "target", "class", "classes", "category", "y")
_LABEL_WORDS = words(
    "label labels target class category categories sentiment intent topic topics emotion polarity genre rating ratings "
    "stars score spam toxic language type tag tags grade similarity stance"
)
_AMOUNT_WORDS = words("score price value amount similarity age percent probability length grade")
_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
)
_MOST_CLASSES = 200
_MOST_UNNAMED = 100
_SURELY_CLASSES = 20
_FEWEST_ROWS_PER_CLASS = 3


def guess_labelled(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> Choice | None:
    """Find a text and its label.

    Raises:
        DataError: Several columns may be text or label, or the kind of labels is not clear.
    """
    labels = _label_columns(sample, columns, wishes)
    if labels:
        _refuse_pairs(sample, columns, wishes)
    text = _text_column(sample, [one for one in columns if one not in labels], wishes, has_label=bool(labels))
    if text is None or not labels:
        return None
    problem = wishes.problem or _problem_of(sample, labels)
    names = [column.name for column in labels]
    settings = {"text_column": text.name, "label_column": names[0] if len(names) == 1 else names}
    seen = f"texts in {text.name!r}, {_WORDS[problem]} in {', '.join(map(repr, names))}"
    return Choice(task=CLASSIFICATION, problem=problem, settings=settings, seen=seen)


def has_sure_label(columns: Sequence[Column]) -> bool:
    """Return whether a column has a usual name of labels and values that repeat."""
    label = named(columns, _SURE_LABELS)
    return label is not None and _may_be_label(label) and label.mean_words < 4


_WORDS = {"single_label": "one label each", "multi_label": "several labels each", "regression": "a number each"}


def _refuse_pairs(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> None:
    """Refuse rows whose class belongs to two texts."""
    names = {column.name.lower() for column in columns}
    pair = next((pair for pair in _PAIRS if names >= set(pair)), None)
    if pair is not None and wishes.text is None:
        raise DataError(
            f"{sample.source} has pairs of texts ({' and '.join(pair)}), and SequenceClassification reads one column. "
            "Join them into one column, or name one with --text_column."
        )


# Columns.


def _text_column(sample: Sample, columns: Sequence[Column], wishes: Wishes, *, has_label: bool) -> Column | None:
    """Return the column of the texts."""
    if wishes.text is not None:
        return column_of(columns, wishes.text)
    texts = [column for column in columns if column.is_text and column.is_content]
    known = named(texts, TEXT_NAMES)
    if known is not None or len(texts) < 2:
        return known or next(iter(texts), None)
    by_length = sorted(texts, key=lambda column: column.mean_length, reverse=True)
    longest, second = by_length[:2]
    if longest.mean_length >= 2 * second.mean_length:
        return longest
    if not has_label:
        return None
    raise DataError(
        f"{sample.source}: {longest.name!r} and {second.name!r} may both be the text; name one with --text_column."
    )


def _label_columns(sample: Sample, columns: Sequence[Column], wishes: Wishes) -> list[Column]:
    """Return the columns of the labels: one, or one for each label."""
    if wishes.label:
        return [column_of(columns, name) for name in wishes.label]
    text = named([column for column in columns if column.is_text], TEXT_NAMES)
    candidates = [one for one in columns if one is not text and one.name != wishes.text and _may_be_label(one)]
    sure = named(candidates, _SURE_LABELS)
    if sure is not None:
        return [sure]
    _refuse_single(sample, columns)
    flags = [column for column in candidates if column.are_flags]
    if len(flags) > 1 and len(flags) == len(candidates):
        return flags
    by_word = [column for column in candidates if column.words & _LABEL_WORDS]
    found = by_word or [column for column in candidates if len(column.counts) <= _MOST_UNNAMED]
    if len(found) > 1:
        names = " and ".join(repr(column.name) for column in found[:4])
        raise DataError(
            f"{sample.source}: {names} may each be the label; name it with --label_column (several with commas, where "
            "each text has several labels)."
        )
    return found


def _refuse_single(sample: Sample, columns: Sequence[Column]) -> None:
    """Refuse a column that has a usual name of labels and the same value in every row."""
    label = named(columns, _SURE_LABELS)
    if label is not None and len(label.counts) == 1:
        raise DataError(
            f"{sample.source}: {label.name!r} holds {next(iter(label.counts))!r} in every row, so that nothing can "
            "be told apart; name another column with --label_column, or set --task CausalLM to learn the texts."
        )


def _may_be_label(column: Column) -> bool:
    """Return whether the cells of a column repeat, or are numbers."""
    is_half_filled = len(column.filled) >= len(column.cells) / 2
    if not (is_half_filled and column.is_content):
        return False
    if column.are_lists:
        return column.share_different < 1 or len(column.cells) < _SURELY_CLASSES
    if column.are_numbers:
        is_counter = column.are_whole and column.share_different == 1 and len(column.filled) > _SURELY_CLASSES
        return len(column.counts) > 1 and not is_counter
    is_repeated = len(column.counts) <= max(len(column.filled) / _FEWEST_ROWS_PER_CLASS, 2)
    has_combinations = column.mean_words <= 6 and _separator_of(column) is not None
    return len(column.counts) > 1 and (is_repeated or has_combinations)


# Problems.


def _problem_of(sample: Sample, labels: Sequence[Column]) -> str:
    """Return the kind of the labels.

    Raises:
        DataError: It is not clear.
    """
    if len(labels) > 1:
        return "multi_label" if all(column.are_flags for column in labels) else "regression"
    [column] = labels
    if column.are_lists or (column.is_text and _separator_of(column) is not None):
        return "multi_label"
    if not column.are_numbers:
        return "single_label"
    num_values = len(column.counts)
    if not column.are_whole:
        return "regression"
    if num_values <= _SURELY_CLASSES:
        return "single_label"
    if column.words & _AMOUNT_WORDS:
        return "regression"
    if column.words & set(_SURE_LABELS) and num_values <= _MOST_CLASSES:
        return "single_label"
    raise DataError(
        f"{sample.source}: {column.name!r} holds {num_values} different whole numbers, classes or "
        "amounts; set --task to single_label or regression."
    )


def _separator_of(column: Column) -> str | None:
    """Return the separator of several labels in one cell, if any: the parts also occur in other cells."""
    for separator in SEPARATORS:
        joined = [value for value in column.counts if separator in value]
        if not joined:
            continue
        whole = {value for value in column.counts if separator not in value}
        parts = [[part.strip() for part in value.split(separator)] for value in joined]
        all_parts = [part for one in parts for part in one]
        # A comma is usual within a name: there, every part must be a label of its own elsewhere.
        are_known = all(set(one) <= whole for one in parts)
        do_repeat = separator != "," and len(set(all_parts)) < len(all_parts)
        if all(all_parts) and (are_known or do_repeat):
            return separator
    return None
