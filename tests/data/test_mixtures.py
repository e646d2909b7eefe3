"""Training sources with weights, through the data modules."""

import itertools
from collections import Counter

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import StepOutput
from lora_lightning.data import InstructionData, Seq2SeqData, TextClassificationData
from lora_lightning.errors import ConfigError, DataError
from tests.data.conftest import labelled
from tests.data.talk import llama_config, save_tokenizer, write_lines
from tests.resume.runs import Pool, Reader, SaveAfter, fit


def mixture(*parts):
    return [{"source": source, "weight": weight} for source, weight in parts]


@pytest.fixture
def two_files(write):
    return write("few.csv", labelled(20)), write("many.jsonl", labelled(80, start=100))


def classification(train, tokenizer, **settings):
    data = TextClassificationData(
        train, tokenizer=tokenizer, **{"val_size": 0, "test_size": 0, "batch_size": 10, **settings}
    )
    data.setup("fit")
    return data


def numbers_of(data):
    """The number that begins each text of an epoch."""
    rows = list(data.train_dataloader())
    firsts = [int(ids[1]) for batch in rows for ids in batch["input_ids"]]
    return [int(data.tokenizer.convert_ids_to_tokens(first).removeprefix("id")) for first in firsts]


def test_an_epoch_has_each_source_by_its_weight(two_files, tokenizer_folder):
    few, many = two_files
    drawn = numbers_of(classification(mixture((few, 3), (many, 1)), tokenizer_folder))
    assert Counter(number < 100 for number in drawn) == {True: 75, False: 25}
    plain = numbers_of(classification([few, many], tokenizer_folder))
    assert Counter(number < 100 for number in plain) == {True: 20, False: 80}


def test_parts_may_be_of_any_kind(two_files, tokenizer_folder):
    frame = pd.DataFrame(labelled(10, start=200), columns=["text", "label"])
    records = [{"text": text, "label": label} for text, label in labelled(10, start=300)]
    train = mixture((list(two_files), 0.5), (frame, 0.25), (records, 0.25))
    data = classification(train, tokenizer_folder)
    by_hundred = Counter(min(number // 100, 1) + max(number // 100 - 1, 0) for number in numbers_of(data))
    assert by_hundred[2] == by_hundred[3] == 30
    assert by_hundred[0] + by_hundred[1] == 60
    assert "train" not in data.hparams
    assert classification(mixture((two_files[0], 1)), tokenizer_folder).hparams["train"][0]["weight"] == 1


def test_parts_keep_their_shares_after_conditions_copies_and_splits(two_files, tokenizer_folder):
    few, many = two_files
    train = mixture((few, 1), (many, 1), (many, 1))
    with pytest.raises(DataError, match=r"many\.jsonl has no rows left to train on: all are copies"):
        classification(train, tokenizer_folder)
    data = classification(
        mixture((few, 1), (many, 1)),
        tokenizer_folder,
        val_size=0.2,
        where=["label != 'maybe'"],
        label_names=["no", "yes"],
    )
    drawn = numbers_of(data)
    assert Counter(number < 100 for number in drawn) == {True: 40, False: 40}
    trained = {data.tokenizer.decode(one.ids[1:2]) for one in data.examples("train")}
    validated = {data.tokenizer.decode(one.ids[1:2]) for one in data.examples("val")}
    assert {f"id{number}" for number in drawn} <= trained
    assert not trained & validated


def test_the_fingerprint_knows_the_weights(two_files, tokenizer_folder):
    few, many = two_files
    prints = [
        classification(train, tokenizer_folder).fingerprint
        for train in (mixture((few, 1), (many, 1)), mixture((few, 1), (many, 2)), [few, many])
    ]
    assert len(set(prints)) == 3
    assert classification(mixture((few, 1), (many, 1)), tokenizer_folder).fingerprint == prints[0]


def test_pairs_of_texts_are_mixed_too(write, tokenizer_folder):
    pairs = [(text, text) for text, _ in labelled(30)]
    files = [write(f"{name}.jsonl", rows, ("source", "target")) for name, rows in (("a", pairs[:5]), ("b", pairs[5:]))]
    train = mixture((files[0], 0.5), (files[1], 0.5))
    data = Seq2SeqData(
        train, source_column="source", target_column="target", tokenizer=tokenizer_folder, val_size=0, test_size=0
    )
    data.setup("fit")
    assert data._mixture().quotas == [15, 15]
    # Rows of fields that look like the settings of a source are rows all the same, if they have a target.
    rows = [{"source": text, "target": text} for text, _ in labelled(4)]
    Seq2SeqData(
        rows, source_column="source", target_column="target", tokenizer=tokenizer_folder, val_size=0, test_size=0
    ).setup("fit")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"source": "a.csv", "weight": 0}], "a weight above 0"),
        ([{"source": "a.csv", "weight": 1}, {"source": "b.csv"}], "expected a source and a weight"),
        ([{"weight": 1}], "expected a source"),
        ([{"source": "a.csv", "weight": float("nan")}], "a weight above 0"),
        ([{"source": "a.csv", "weight": "much"}], "a weight above 0"),
        ([{"source": [{"source": "a.csv", "weight": 1}], "weight": 1}], "a mixture itself"),
    ],
)
def test_broken_mixtures_are_refused(train, message):
    with pytest.raises(ConfigError, match=message):
        TextClassificationData(train)


def test_only_training_rows_are_drawn(two_files):
    with pytest.raises(ConfigError, match="val gives weights"):
        TextClassificationData(two_files[0], val=mixture((two_files[1], 1)))


def test_a_column_that_one_source_lacks_is_named_with_it(write, two_files, tokenizer_folder):
    other = write("other.csv", labelled(10, start=200), ("review", "label"))
    with pytest.raises(DataError, match=r"other\.csv has no column 'text'"):
        classification(mixture((two_files[0], 1), (other, 1)), tokenizer_folder)


# Language models.


@pytest.fixture(scope="module")
def talk_tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), config=llama_config())


@pytest.fixture
def talks(tmp_path):
    few = [{"text": f"few {number} " + "ab " * (number % 5)} for number in range(9)]
    many = [{"text": f"many {number} " + "cd " * (number % 7)} for number in range(60)]
    return write_lines(tmp_path / "few.jsonl", few), write_lines(tmp_path / "many.jsonl", many)


def instruction(talks, tokenizer, weights=(1, 1), **settings):
    train = mixture(*zip(talks, weights, strict=True))
    data = InstructionData(
        train, tokenizer=tokenizer, **{"val_size": 0, "batch_size": 3, "template": "plain", **settings}
    )
    data.setup("fit")
    return data


def samples_of(data):
    batches = list(data.train_dataloader())
    decoded = [data.tokenizer.decode(ids[mask]) for batch in batches for ids, mask in _rows(batch)]
    return list(itertools.chain.from_iterable(text.split("<eos>")[:-1] for text in decoded))


def _rows(batch):
    pad = 0
    return [(ids, ids != pad) for ids in batch["input_ids"]]


def test_packed_rows_hold_the_shares(talks, talk_tokenizer):
    data = instruction(talks, talk_tokenizer, (2, 1), packing=True, max_length=64)
    drawn = Counter(text.split()[0] for text in samples_of(data))
    assert drawn == {"few": 46, "many": 23}
    assert Counter(samples_of(data)) == Counter(samples_of(data))  # drawn once


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 64}, {"num_workers": 2}])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_streams_are_mixed(talks, talk_tokenizer, settings):
    data = instruction(talks, talk_tokenizer, (1, 1), streaming=True, shuffle_buffer=4, **settings)
    first = samples_of(data)
    drawn = Counter(first)
    many = [text for text in drawn if text.startswith("many")]
    assert len(many) == 60
    assert all(drawn[text] == 1 for text in many)
    repeated = sum(count for text, count in drawn.items() if text.startswith("few"))
    assert 30 < repeated < 100  # 60 expected, of nine texts
    assert samples_of(instruction(talks, talk_tokenizer, (1, 1), streaming=True, shuffle_buffer=4, **settings)) == first
    loader = data.train_dataloader()
    epochs = [[batch["input_ids"].tolist() for batch in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_broken_rows_of_one_source_are_counted_once(talks, talk_tokenizer, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "few 0"}\n{"text": \n{"text": "few 1"}\n')
    with pytest.warns(UserWarning, match="broken rows? ") as told:
        texts = samples_of(instruction((str(broken), talks[1]), talk_tokenizer, (1, 1), streaming=True))
    assert any("1 broken rows are left out;" in str(one.message) for one in told)
    assert sum(text.startswith("few") for text in texts) > 10


class PackedSequential(nn.Sequential):
    """Takes positions, as models of packed rows must."""

    def forward(self, x, position_ids=None):
        return super().forward(x)


class LetterReader(Reader):
    """Guesses from a text whether its length is even."""

    def configure_backbone(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return PackedSequential(
                *(nn.Embedding(320, 8), Pool(), nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh()),
                *(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)),
            )

    def compute_loss(self, batch):
        targets = (batch["input_ids"] != 0).sum(1) % 2
        return StepOutput(F.cross_entropy(self.adapted(batch["input_ids"]), targets))


@pytest.mark.parametrize("stop", [4, 23, 31])
@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 64}, {"streaming": True}])
def test_a_mixture_resumes_exactly(talks, talk_tokenizer, tmp_path, settings, stop):
    def run(*callbacks, **trainer):
        data = instruction(talks, talk_tokenizer, (2, 1), shuffle_buffer=5, **settings)
        return fit(LetterReader(), data, *callbacks, max_epochs=-1, max_steps=40, limit_val_batches=0, **trainer)

    full = run(SaveAfter(tmp_path, [stop]))
    resumed = run(seed=99, ckpt_path=tmp_path / f"{stop}.ckpt")
    wanted = {number: loss for number, loss in full[0].losses.items() if number > stop}
    assert len(wanted) == 40 - stop
    assert resumed[0].losses == wanted
    assert all(torch.equal(weight, resumed[1][name]) for name, weight in full[1].items())
    assert run(seed=99)[0].losses != full[0].losses  # control
