"""A tokenizer comes back as a training used it: additions, special tokens, chat template and its arguments."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import UndefinedError
from transformers import AddedToken, AutoTokenizer

from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.errors import CheckpointError
from lora_lightning.texts.saved_tokenizer import (
    SavedTokenizer,
    end_of_turn,
    stop_ids,
    tokenizer_files,
    with_defaults,
)
from tests.commands.language_models import END_OF_TURN, save_language_model

TALK = [{"role": "user", "content": "w1"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_language_model(tmp_path_factory.mktemp("base")))


def data_with(tokenizer: Any, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=tokenizer, tokenizer_name=None, **settings)


def test_additions_come_back(base: str) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["new1", AddedToken("<mark>", special=True, lstrip=True)])
    tokenizer.pad_token = "<mark>"
    saved = SavedTokenizer.of_data(data_with(tokenizer), base)
    assert saved is not None
    again = SavedTokenizer.from_plain(json.loads(json.dumps(saved.plain())), "x").load("x")
    assert again.get_vocab() == tokenizer.get_vocab() != load_tokenizer(base).get_vocab()
    assert again.pad_token_id == tokenizer.pad_token_id
    text = "w1 new1 <mark> w2"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] != load_tokenizer(base)(text)["input_ids"]


def test_another_vocabulary_is_refused(base: str, tmp_path: Path) -> None:
    saved = SavedTokenizer.of_data(data_with(load_tokenizer(base)), base)
    assert saved is not None
    save_language_model(tmp_path)
    words = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(words.replace('"w3"', '"w03"'))
    saved.load("x")
    with pytest.raises(CheckpointError, match="trained with another tokenizer"):
        saved.load("x", name=str(tmp_path))


def test_arguments_of_the_template_are_its_defaults(base: str) -> None:
    template = "{{ 'slow ' if thinking else 'fast ' }}{{ marks.b }}{{ messages[0].content }}"
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = template
    arguments = {"thinking": True, "marks": {"a": None, "b": [1, "x"]}}
    saved = SavedTokenizer.of_data(data_with(tokenizer, template=None, template_arguments=arguments), base)
    assert saved is not None
    again = saved.load("x")
    asked = tokenizer.apply_chat_template(TALK, tokenize=False, **arguments)
    assert again.apply_chat_template(TALK, tokenize=False) == asked == "slow [1, 'x']w1"
    assert again.apply_chat_template(TALK, tokenize=False, thinking=False) == "fast [1, 'x']w1"
    with pytest.raises(UndefinedError):  # negative control: the template alone knows none of them
        tokenizer.apply_chat_template(TALK, tokenize=False)
    assert with_defaults(template, {}) == template


@pytest.mark.parametrize(("template", "answers"), [(None, True), ("chatml", True), ("plain", False)])
def test_what_was_trained_to_answer(base: str, template: str | None, answers: bool) -> None:
    tokenizer = load_tokenizer(base)
    for data, expected in ((data_with(tokenizer, template=template), answers), (data_with(tokenizer), False)):
        saved = SavedTokenizer.of_data(data, base)
        assert saved is not None
        assert saved.answers is expected


def test_data_without_a_tokenizer() -> None:
    assert SavedTokenizer.of_data(None, "base") is None
    assert SavedTokenizer.of_data(data_with(object()), "base") is None


def test_older_checkpoints_name_their_template(base: str) -> None:
    for settings, answers, start in (
        ({"template": "dialogue"}, True, "<s>User"),
        ({}, False, "<user>"),
        (None, False, ""),
    ):
        saved = SavedTokenizer.from_settings(settings, base, None)
        tokenizer = saved.load("x")
        assert saved.answers_with(tokenizer) is answers
        assert tokenizer.apply_chat_template(TALK, tokenize=False).startswith(start)


def test_files_are_what_transformers_loads(base: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer(["w1 w2", "w3"], padding="max_length", truncation=True, max_length=3)  # as a data module leaves it
    for name, content in tokenizer_files(tokenizer, "{{ messages[0].content }}").items():
        (tmp_path / name).write_bytes(content)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == "{{ messages[0].content }}" != tokenizer.chat_template
    assert again("w1 w2 w3 w4 w5")["input_ids"] == load_tokenizer(base)("w1 w2 w3 w4 w5")["input_ids"]
    assert tokenizer_files(object(), None) == {}


def test_ends(base: str) -> None:
    tokenizer = load_tokenizer(base)
    assert end_of_turn(tokenizer) == END_OF_TURN
    assert stop_ids(tokenizer, is_chat=True) == [tokenizer.eos_token_id, END_OF_TURN]
    assert stop_ids(tokenizer, is_chat=False) == [tokenizer.eos_token_id]
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "must be an object, got list"),
        ({"other": 1}, "holds the unknown 'other'"),
        ({"name": 1}, "holds a name that is not a text"),
        ({"answers": "yes"}, "neither true, false nor null"),
        ({"special_tokens": {"eos_token": 1}}, "special_tokens that are not texts"),
        ({"special_tokens": {"__class__": "x"}}, "special_tokens that are not texts"),
        ({"added_tokens": [{"content": 1}]}, "added_tokens that are not tokens"),
        ({"added_tokens": [{"content": "x", "special": "yes"}]}, "added_tokens that are not tokens"),
    ],
)
def test_changed_entries_are_refused(change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SavedTokenizer.from_plain(change, "x.ckpt")


def test_a_run_without_names(base: str) -> None:
    with pytest.raises(CheckpointError, match="names no backbone and no tokenizer"):
        SavedTokenizer().load("x.ckpt")
