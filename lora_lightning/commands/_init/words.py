"""Messages of `init` about the data and its decisions, and the comments in the config."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning.commands._init.backbone import Backbone
from lora_lightning.commands._init.choice import DATA_MODULES, Choice
from lora_lightning.commands._init.recipe import Recipe
from lora_lightning.commands._init.sample import Sample
from lora_lightning.commands._init.trial import PERCENTILE, Trial
from lora_lightning.paths import some_of

_MOST_LABELS = 20


def report(
    sample: Sample, choice: Choice, trial: Trial, backbone: Backbone, recipe: Recipe, *, is_given: bool
) -> list[str]:
    """Return observations and decisions, in one line each.

    Args:
        sample: The sample.
        choice: The task.
        trial: The trial on the sample.
        backbone: The backbone.
        recipe: Settings of the training.
        is_given: Whether the user named the backbone.
    """
    lines = [
        f"Data: {_rows(sample)}{_reading(sample)}; columns: {some_of(sample.columns, 12)}.",
        f"Task: {choice.task}{f' ({choice.problem})' if choice.problem else ''}, since it has {choice.seen}.",
    ]
    if trial.labels:
        lines.append(f"Classes: {_labels(sample, choice, trial)}.")
    left_out = _left_out(trial)
    if left_out:
        lines.append(f"Left out in training: {left_out}.")
    lines.append(f"Backbone: {backbone.name}{'' if is_given else ', usual for this task; --backbone names another'}.")
    lines.append(f"Length: {_length(trial)}; max_length {recipe.data['max_length']}.")
    lines.append(f"Evaluation: {_evaluation(sample, recipe)}.")
    lines.append(
        f"Training: LoRA of rank {recipe.rank} on all linear layers, batches of {recipe.data['batch_size']}, "
        f"{recipe.epochs} epochs; the best checkpoint by {recipe.monitor[0]}."
    )
    return lines


def comments_on(sample: Sample, choice: Choice, trial: Trial, backbone: Backbone, *, is_given: bool) -> dict[str, str]:
    """Return the comments for `config_text`; the arguments are those of `report`."""
    comments = {
        "head": f"{DATA_MODULES[choice.task]} reads {choice.seen}; {_rows(sample)}.",
        "max_length": _length(trial),
    }
    if trial.labels:
        comments["labels"] = _labels(sample, choice, trial)
    if trial.num_bad:
        comments["bad_rows"] = f"{trial.num_bad} broken rows; the run lists them in bad_rows.jsonl"
    if not is_given:
        comments["backbone"] = "a Hub name, a folder, or pkg://package/folder"
    del backbone
    return comments


def labels_in_words(labels: Mapping[str, int], word: str) -> str:
    """Return the labels and how many rows have each, the most frequent first.

    Example:
        >>> labels_in_words({"no": 3, "yes": 5}, "labels")
        '2 labels: yes (5), no (3)'
    """
    ordered = sorted(labels, key=lambda name: -labels[name])
    shown = [f"{' '.join(name.split())[:40]} ({labels[name]:,})" for name in ordered]
    return f"{len(labels)} {word}: {some_of(shown, _MOST_LABELS)}"


def _labels(sample: Sample, choice: Choice, trial: Trial) -> str:
    word = "tags, with the sentences that have each" if choice.task == "TokenClassification" else "labels"
    where = "" if sample.is_whole else f", of {len(sample.records):,} rows that were looked at"
    return labels_in_words(trial.labels, word) + where


def _rows(sample: Sample) -> str:
    if sample.is_whole:
        return f"{sample.num_rows:,} rows of {sample.source}"
    return f"about {sample.num_rows:,} rows of {sample.source}, of which {len(sample.records):,} were looked at"


def _reading(sample: Sample) -> str:
    settings = sample.data_settings
    return "".join(f", {name} {value!r}" for name, value in settings.items())


def _left_out(trial: Trial) -> str:
    counts = {
        "incomplete rows": trial.num_incomplete,
        "broken rows": trial.num_bad,
        "copies and contradictions": trial.num_copies,
    }
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _length(trial: Trial) -> str:
    tokens = sorted(trial.lengths)[-1 - len(trial.lengths) * (100 - PERCENTILE) // 100]
    if trial.is_counted:
        return f"{PERCENTILE} % of the rows have at most {tokens} tokens"
    return f"{PERCENTILE} % of the rows have at most about {tokens} tokens (estimated: the tokenizer is not here)"


def _evaluation(sample: Sample, recipe: Recipe) -> str:
    parts = []
    for split, word in (("val", "validation"), ("test", "test")):
        size = recipe.data.get(f"{split}_size")
        if split in recipe.data:
            parts.append(f"{word} rows from {recipe.data[split]}")
        elif size:
            parts.append(f"{f'{size:.0%}' if isinstance(size, float) else f'{size:,}'} of the rows for {word}")
    return "; ".join([*parts, *recipe.notes, *sample.notes])
