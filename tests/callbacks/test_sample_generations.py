"""Samples during validation: what is shown, where it is written, and that the run does not notice."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger

from lora_lightning.adapters import adapter_state_dict
from lora_lightning.callbacks import SampleGenerations
from lora_lightning.callbacks.sample_generations import Sample, encode, log_text, render
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.generation import examples_of
from tests import models
from tests.callbacks.runs import make_trainer
from tests.tasks.languages import Speaker, batches, loader

CHAT = "{% for m in messages %}ask {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}say{% endif %}"


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[BOS]", "[END]", *(f"w{index}" for index in range(models.VOCABULARY - 5)), "ask", "say"]
    plain = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", eos_token="[END]")


class Talk(LightningDataModule):
    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def train_dataloader(self):
        return loader(batches())

    def val_dataloader(self):
        return loader(batches())


class TwoTalks(Talk):
    def val_dataloader(self):
        return {"first": loader(batches()), "second": loader(batches((5, 7)))}


def fit(folder, tokenizer, *callbacks, data=None, **settings):
    torch.manual_seed(1)
    task = Speaker()
    run = make_trainer(folder, *callbacks, **{"max_epochs": 2, "num_sanity_val_steps": 2, **settings})
    run.fit(task, (data or Talk)(tokenizer))
    return task, run


def written(folder):
    return [json.loads(line) for line in (folder / "run" / "version_0" / "samples.jsonl").read_text().splitlines()]


def test_of_several_sets_the_first_one_gives_the_rows(tmp_path, tokenizer):
    for name, data in (("one", Talk), ("two", TwoTalks)):
        fit(tmp_path / name, tokenizer, SampleGenerations(num_samples=3, max_new_tokens=5), data=data)
    assert written(tmp_path / "two") == written(tmp_path / "one")
    assert len(written(tmp_path / "two")) == 6


def test_the_first_rows_are_answered_after_each_validation(tmp_path, tokenizer, capsys):
    fit(tmp_path, tokenizer, SampleGenerations(num_samples=3, max_new_tokens=5))
    rows = written(tmp_path)
    assert [(row["step"], row["epoch"]) for row in rows] == [(4, 0)] * 3 + [(8, 1)] * 3  # not in the sanity check
    examples = [example for batch in batches() for example in examples_of(batch)][:3]
    assert [row["prompt"] for row in rows[:3]] == [tokenizer.decode(example.prompt) for example in examples]
    assert [row["expected"] for row in rows[:3]] == [tokenizer.decode(example.answer) or None for example in examples]
    assert all(1 <= len(row["generated"].split()) <= 5 for row in rows if row["generated"])
    assert [row["generated"] for row in rows[:3]] != [row["generated"] for row in rows[3:]]
    shown = capsys.readouterr().out
    assert "Samples after step 4:" in shown
    assert rows[-1]["generated"] in shown


def test_given_prompts_are_answered(tmp_path, tokenizer):
    fit(tmp_path, tokenizer, SampleGenerations(["w5 w6", "w7"], temperature=1.0), max_epochs=1)
    rows = written(tmp_path)
    assert [row["prompt"] for row in rows] == ["w5 w6", "w7"]
    assert [row["expected"] for row in rows] == [None, None]


def test_the_run_does_not_notice(tmp_path, tokenizer):
    states = []
    for name, callbacks in {"with": [SampleGenerations(temperature=1.0)], "without": []}.items():
        task, run = fit(tmp_path / name, tokenizer, *callbacks)
        assert task.adapted.training
        states.append((adapter_state_dict(task.adapted), torch.random.get_rng_state(), run.callback_metrics))
    (one, rng, metrics), (other, other_rng, other_metrics) = states
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(rng, other_rng)
    assert metrics == other_metrics


def test_an_answer_ends_where_the_data_end_theirs(tmp_path, tokenizer, monkeypatch):
    """Answers that end with a special token of a chat format teach what stops a generation."""
    stops = []
    monkeypatch.setattr(
        "lora_lightning.callbacks.sample_generations.generate",
        lambda *given, **settings: stops.append(settings["stop"]) or [[3] for _ in given[1]],
    )

    class Ended(Talk):
        def val_dataloader(self):
            ids = torch.tensor([[5, 6, 7, 1]])  # [BOS] stands for an end of turn
            return loader([{"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 1]])}])

    tokenizer.bos_token = "[BOS]"
    monkeypatch.setattr("tests.callbacks.test_sample_generations.Talk", Ended)
    fit(tmp_path, tokenizer, SampleGenerations(["w5"]), max_epochs=1)
    assert stops == [[2, 1]]


def test_a_trial_run_writes_nothing(tmp_path, tokenizer, capsys):
    fit(tmp_path, tokenizer, SampleGenerations(), fast_dev_run=True)
    assert "Samples after step" in capsys.readouterr().out
    assert not list(tmp_path.rglob("samples.jsonl"))


def test_a_prompt_is_a_users_turn_where_there_is_a_chat_template(tokenizer):
    assert tokenizer.decode(encode("w5 w6", tokenizer)) == "w5 w6"
    assert tokenizer.decode(encode("w5 [END]", tokenizer)) == "w5"
    tokenizer.chat_template = CHAT
    try:
        assert tokenizer.decode(encode("w5 w6", tokenizer)) == "ask w5 w6 say"
    finally:
        tokenizer.chat_template = None


def test_text_goes_to_loggers_that_take_it(tmp_path):
    calls = []

    def note(*args, **kwargs):
        calls.append((args, kwargs))

    samples = [Sample("a|b", "c\nd", "e"), Sample("f", None, "g")]
    log_text(SimpleNamespace(log_text=note), samples, 3)
    assert calls.pop()[1]["data"] == [["a|b", "c\nd", "e"], ["f", "", "g"]]
    log_text(SimpleNamespace(experiment=SimpleNamespace(add_text=note)), samples, 3)
    assert r"a\|b | c<br>d | e" in calls.pop()[0][1]
    log_text(SimpleNamespace(experiment=SimpleNamespace(log_text=note), run_id="1"), samples, 3)
    assert calls.pop()[0] == ("1", render(samples, 3), "samples/3.txt")
    log_text(CSVLogger(tmp_path), samples, 3)
    assert not calls


@pytest.mark.parametrize(
    "settings", [{"prompts": ["a", ""]}, {"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}]
)
def test_settings_are_checked(settings):
    with pytest.raises(ConfigError, match="at least"):
        SampleGenerations(**settings)


def test_without_a_tokenizer_it_says_so(tmp_path):
    with pytest.raises(ConfigError, match="finds no tokenizer"):
        fit(tmp_path, None, SampleGenerations())
