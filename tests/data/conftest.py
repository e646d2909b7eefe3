import json

import pytest

from lora_lightning.data import TextClassificationData
from tests.data.instruction_runs import PAIRS
from tests.data.talk import llama_config, save_tokenizer, write_lines

WORDS = [f"w{index}" for index in range(60)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A word-level tokenizer with a padding token and BERT's frame around a text."""
    return _save_tokenizer(tmp_path_factory.mktemp("tokenizer"), pad_token="[PAD]")


@pytest.fixture(scope="session")
def tokenizer_without_pad(tmp_path_factory):
    """A word-level tokenizer as GPT-2 has it: an end token, nothing to pad with, no frame."""
    return _save_tokenizer(tmp_path_factory.mktemp("tokenizer_without_pad"), eos_token="[END]")


@pytest.fixture
def write(tmp_path):
    """Write rows to a file; its suffix says how."""

    def _write(name, rows, columns=("text", "label")):
        path = tmp_path / name
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        if path.suffix == ".csv":
            lines = [",".join(columns), *(",".join(str(cell) for cell in row) for row in rows)]
        else:
            lines = [json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return _write


@pytest.fixture
def build_texts(write, tokenizer_folder):
    """Set up a data module over generated rows."""

    def _build(rows=None, stage=None, **settings):
        path = write("train.csv", labelled(100) if rows is None else rows)
        data = TextClassificationData(path, **{"tokenizer": tokenizer_folder, "batch_size": 8, **settings})
        data.setup(stage)
        return data

    return _build


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A byte-level tokenizer beside the config of a small Llama."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), config=llama_config())


@pytest.fixture
def build(tmp_path, folder):
    """Write records to a file and set InstructionData up with it."""
    from lora_lightning.data import InstructionData

    def _build(records=PAIRS, stage="fit", **settings):
        path = write_lines(tmp_path / "train.jsonl", records)
        data = InstructionData(path, **{"tokenizer": folder, "batch_size": 4, "val_size": 0, **settings})
        data.setup(stage)
        return data

    return _build


def labelled(count, labels=("no", "yes"), start=0):
    """Rows with different texts of 1 to 9 words, the labels in turn."""
    rows = []
    for index in range(start, start + count):
        words = [WORDS[(index * 7 + offset * (index + 1)) % len(WORDS)] for offset in range(index % 9)]
        rows.append((" ".join([f"id{index}", *words]), labels[index % len(labels)]))
    return rows


def _save_tokenizer(folder, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[END]", *WORDS, *(f"id{index}" for index in range(400))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "pad_token" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=256, **special)
    fast.save_pretrained(folder)
    (folder / "config.json").write_text("{}")  # as in a backbone's folder
    return str(folder)
