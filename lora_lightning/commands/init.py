"""The command `lora-lightning init`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_lightning.commands._init.backbone import check_fits, look_at, template_for, usual_backbone
from lora_lightning.commands._init.choice import Guess, choose, wishes_from
from lora_lightning.commands._init.columns import columns_of
from lora_lightning.commands._init.labelled import guess_labelled
from lora_lightning.commands._init.language import guess_conversation, guess_pairs, guess_plain_text
from lora_lightning.commands._init.recipe import lengths_for, recipe_for
from lora_lightning.commands._init.sample import take_sample
from lora_lightning.commands._init.structured import guess_choices, guess_tagged
from lora_lightning.commands._init.trial import check_splits, try_on, without_useless_splits
from lora_lightning.commands._init.words import comments_on, report
from lora_lightning.commands._init.writing import config_text
from lora_lightning.errors import ConfigError

_GUESSES: dict[str, Guess] = {
    "CausalLM": guess_conversation,
    "TokenClassification": guess_tagged,
    "MultipleChoice": guess_choices,
    "Seq2SeqLM": guess_pairs,
    "SequenceClassification": guess_labelled,
    "plain text": guess_plain_text,
}
"""The function for each task that analyses the columns, the most specific first."""


def init(
    data: str,
    output: str = "config.yaml",
    backbone: str | None = None,
    task: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> None:
    """Analyse data and write a config that trains on them.

    Reads some thousand rows, and prints observations and decisions. An existing file is never overwritten.

    Args:
        data: The training data: a file, a folder, a pattern such as data/*.csv, or a Hub data set.
        output: The file to write.
        backbone: Hub name, folder, or pkg://package/folder of the model; by default the usual one of the task. The
            maximum length is counted with its tokenizer if that is on this machine, and estimated otherwise.
        task: SequenceClassification (or single_label, multi_label, regression), TokenClassification, MultipleChoice,
            Seq2SeqLM or CausalLM; by default chosen by the data.
        text_column: The column with the texts, words, questions, sources or prompts; by default chosen by the data.
        label_column: The column with the labels, tags, answers or targets, or several with commas; by default chosen by
            the data.
    """
    path = _free(output)
    given = None if backbone is None else look_at(backbone)
    sample = take_sample(data)
    columns = columns_of(sample.records, sample.columns)
    architecture = None if given is None else given.architecture
    wishes = wishes_from(task, text_column, label_column, sample.columns, architecture)
    choice = choose(sample, columns, wishes, _GUESSES)
    used = given or look_at(usual_backbone(choice, columns))
    check_fits(used, choice.task)
    choice = replace(choice, settings={**choice.settings, **template_for(used, choice)})
    trial = try_on(sample, choice, used)
    sample = without_useless_splits(sample, choice)
    lengths = lengths_for(choice, trial, used)
    recipe = recipe_for(sample, choice, trial, lengths)
    check_splits(sample, choice, recipe.data)
    comments = comments_on(sample, choice, trial, used, is_given=given is not None)
    text = config_text(sample, choice, used.name, recipe, comments)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    print("\n".join(report(sample, choice, trial, used, recipe, is_given=given is not None)))
    print(f"Wrote {output}. Next: lora-lightning fit --config {output}")


def _free(output: str) -> Path:
    """Return the path of a file that does not exist yet.

    Raises:
        ConfigError: It exists, or its folder does not.
    """
    path = Path(output).expanduser()
    if path.exists():
        raise ConfigError(f"{output} exists, and init overwrites nothing; name another file with --output.")
    if not path.parent.is_dir():
        raise ConfigError(f"--output is {output!r}, and its folder does not exist; make it, or name another file.")
    return path
