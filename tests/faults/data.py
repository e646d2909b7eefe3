"""Faults in data files and in what is asked of them."""

from tests.cli_toys import ToyData
from tests.faults.bench import FIT, TEST, Fault, data, yaml

GOOD = "text,label\n" + "".join(f"w{index},{('no', 'yes')[index % 2]}\n" for index in range(24))


def validated_on(content):
    """Give validation rows of one's own."""

    def provoke():
        arguments = data("val.csv", content)()
        return [*arguments[:-2], "--data.val", "val.csv", "--data.val_size", "null"]

    return provoke


def tested_on(content):
    """Test the run's model on rows of one's own."""

    def provoke():
        data("other.csv", content)()
        return [*TEST, "--data.train", "other.csv"]

    return provoke


def questions(choices, *others):
    """Train on questions with choices."""
    rows = [f'{{"question": "w1", "choices": {choices}, "label": 0}}', *others]

    def provoke():
        data("a.jsonl", "\n".join(rows))()
        return ["fit", "--model", "MultipleChoice", "--model.backbone", "base", "--data", "MultipleChoiceData",
                "--data.train", "a.jsonl"]  # fmt: skip

    return provoke


class BrokenPoints(ToyData):
    """Points of which one is NaN.

    Args:
        broken: Which points: `train_points` or `val_points`.
    """

    def __init__(self, broken: str):
        super().__init__()
        self.broken = broken

    def _broken_loader(self):
        loader = self._loader()
        loader.dataset[2]["x"][1] = float("nan")
        return loader

    def train_dataloader(self):
        return self._broken_loader() if self.broken == "train_points" else self._loader()

    def val_dataloader(self):
        return self._broken_loader() if self.broken == "val_points" else self._loader()


POINTS = """\
model:
  class_path: tests.cli_toys.ToyTask
  init_args: {{method: {{class_path: LoRA, init_args: {{r: 2}}}}}}
data: {{class_path: tests.faults.data.BrokenPoints, init_args: {{broken: {broken}}}}}
trainer: {{accelerator: cpu, max_epochs: 1, num_sanity_val_steps: 0, enable_progress_bar: false}}
"""


def points(broken):
    """Train on numbers, which only data modules of the user's own hold."""
    return yaml(POINTS.format(broken=broken))


FAULTS = [
    Fault(
        "missing file",
        r"^trian\.csv does not exist; the nearest names there: train\.csv",
        [*FIT, "--data.train", "trian.csv"],
    ),
    Fault("empty file", r"^a\.csv is empty \(0 bytes\)", data("a.csv", "")),
    Fault("column names alone", r"^a\.csv holds no rows", data("a.csv", "text,label\n")),
    Fault(
        "wrong column",
        r"^train\.csv has no column 'txt', which text_column names; its columns: text, label\. Did you mean 'text'\?",
        [*FIT, "--data.text_column", "txt"],
    ),
    Fault(
        "other separator",
        r"^a\.csv has no column .* It looks as if another separator is used: set separator",
        data("a.csv", GOOD.replace(",", ";")),
    ),
    Fault(
        "latin-1",
        r"^a\.csv is not utf-8 \(byte 12, line 2\): set encoding to the file's own; try latin-1",
        data("a.csv", "text,label\nné,no\n".encode("latin-1")),
    ),
    Fault("unknown encoding", r"^encoding 'utf-9' is unknown; try utf-8", [*FIT, "--data.encoding", "utf-9"]),
    Fault(
        "unknown kind of file",
        r"^a\.xlsx is of an unknown kind: expected a name that ends in \.csv",
        data("a.xlsx", "x"),
    ),
    Fault(
        "malformed CSV",
        r"^a\.csv, line 26: expected 2 fields, as the first line has, and found 4\. Check for a separator that is not",
        data("a.csv", GOOD + "a,b,c,d\n"),
    ),
    Fault(
        "malformed JSON",
        r"^a\.jsonl, line 2: this is not valid JSON",
        data("a.jsonl", '{"text": "a", "label": "b"}\n{"text": \n'),
    ),
    Fault(
        "JSON that is no table",
        r"^a\.jsonl, line 1: expected an object",
        data("a.jsonl", "[1, 2]\n3\n".replace("[1, 2]\n", "")),
    ),
    Fault("Parquet that is none", r"^a\.parquet cannot be read as Parquet", data("a.parquet", "hello")),
    Fault(
        "one class only",
        r"^a\.csv has only the label 'no' .*expected two or more\. Check label_column",
        data("a.csv", "text,label\na,no\nb,no\n"),
    ),
    Fault(
        "NaN for every label",
        r"^a\.jsonl: none of the 2 rows can be used: none has a text and a label",
        data("a.jsonl", '{"text": "a", "label": NaN}\n{"text": "b", "label": NaN}\n'),
    ),
    Fault(
        "text that is infinite",
        r"^a\.jsonl, line 2: the column 'text' holds inf; expected a text",
        data("a.jsonl", '{"text": "a", "label": 0}\n{"text": Infinity, "label": 1}\n'),
    ),
    Fault(
        "NaN for a choice",
        r"^a\.jsonl, line 1: the column 'choices\[1\]' holds nan; expected a text",
        questions('["a", NaN]'),
    ),
    Fault(
        "question left out",
        r"^a\.jsonl, line 2 has no column 'question', which question_column names; its columns: choices, label",
        questions('["a", "b"]', '{"choices": ["a", "b"], "label": 1}'),
    ),
    Fault(
        "NaN in a training batch",
        r"^Training stopped before optimizer step 1: the loss is nan .*look for NaN in the data \(epoch 0, batch 0\)",
        points("train_points"),
        leaves_run=True,
    ),
    Fault(
        "NaN in a validation batch",
        r"^Training stopped after optimizer step 4: val/loss is nan\. No checkpoint .*rows in the validation data",
        points("val_points"),
        leaves_run=True,
    ),
    Fault(
        "class too rare to split",
        r"^Too rare to be split into train, val, test, .*'maybe' \(1\)",
        data("a.csv", GOOD + "x,maybe\n"),
    ),
    Fault(
        "class missing in training",
        r"^val\.csv has labels among its val rows that the training rows do not have: 'maybe' \(val\.csv, line 2\);",
        validated_on("text,label\nx,maybe\n"),
    ),
    Fault(
        "class that the model does not know",
        r"^other\.csv has labels among its .* that the model does not have: 'maybe'",
        tested_on(GOOD.replace("yes", "maybe")),
    ),
    Fault(
        "more rows than there are", r"^The sizes ask for \d+ rows .* but 40 are left", [*FIT, "--data.test_size", "400"]
    ),
    Fault(
        "split size of two kinds", r"^val_size is 4, but val names rows of its own", [*FIT, "--data.val", "train.csv"]
    ),
    Fault(
        "condition that is none",
        r"^The condition 'text ~ 3' in where cannot be read: expected a column",
        [*FIT, "--data.where", "['text ~ 3']"],
    ),
    Fault(
        "condition on a missing column",
        r"^train\.csv has no column 'score', which where names; its columns: text, label",
        [*FIT, "--data.where", "['score > 3']"],
    ),
    Fault(
        "texts longer than the model",
        r"^A row of train has 42 tokens, and base takes at most 32; set max_length to 32 or less",
        data("a.csv", GOOD.replace("w1,", "w1 " * 40 + ","), "--data.max_length", "4096"),
    ),
    Fault(
        "batch of no rows", r"^batch_size is 0: expected a whole number of at least 1", [*FIT, "--data.batch_size", "0"]
    ),
    Fault(
        "missing tokenizer",
        r"^The backbone folder '\./nowhere' does not exist",
        [*FIT, "--data.tokenizer", "./nowhere"],
    ),
    Fault("tokenizer's folder without one", r"^The folder 'run' holds no tokenizer", [*FIT, "--data.tokenizer", "run"]),
    Fault(
        "folder without texts",
        r"^The folder run holds no texts: expected one sub-folder for each class",
        [*FIT, "--data.train", "run"],
    ),
]
