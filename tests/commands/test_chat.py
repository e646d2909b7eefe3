"""`chat` keeps a conversation going, forgets what no longer fits, and leaves when asked."""

from __future__ import annotations

import pytest

from lora_lightning.commands import chat as command
from lora_lightning.commands._language.model import load_language_model
from lora_lightning.commands._language.sampling import Sampling
from lora_lightning.commands.chat import HELP, Conversation, chat
from lora_lightning.errors import ConfigError
from tests.commands.language_models import save_language_model, save_lm_checkpoint

GREEDY = Sampling(max_new_tokens=4, temperature=0.0, top_p=1.0, top_k=0)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_language_model(folder / "base")
    return str(save_lm_checkpoint(folder / "base", folder / "x.ckpt"))


def type_in(monkeypatch, *lines):
    """Let `input` give some lines, and raise those that are exceptions; return what is still to be read."""
    waiting = list(lines)

    def read(prompt=""):
        line = waiting.pop(0) if waiting else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    return waiting


def contexts(monkeypatch, speaker):
    """Collect the texts that a model is asked to go on from."""
    seen = []
    go_on = type(speaker).go_on

    def watched(self, ids, *arguments, **settings):
        seen.append(self.tokenizer.decode(ids))
        return go_on(self, ids, *arguments, **settings)

    monkeypatch.setattr(type(speaker), "go_on", watched)
    return seen


def test_each_answer_sees_the_turns_before_it(ckpt, monkeypatch, capsys):
    speaker = load_language_model(ckpt, None, None)
    seen = contexts(monkeypatch, speaker)
    conversation = Conversation(speaker, GREEDY, system="w9")
    conversation.hear("w1")
    answer = conversation.turns[-1]["content"]
    assert capsys.readouterr().out == f"model> {answer}\n"
    conversation.hear("w2")
    assert seen == ["w9 <user> w1 <end> <model>", f"w9 <user> w1 <end> <model> {answer} <end> <user> w2 <end> <model>"]
    conversation.hear("/reset")
    conversation.hear("w2")
    assert seen[2] == "w9 <user> w2 <end> <model>"
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]


def test_the_oldest_turns_go_when_the_context_is_full(ckpt, monkeypatch, capsys):
    speaker = load_language_model(ckpt, None, None)
    assert speaker.context == 32
    conversation = Conversation(speaker, GREEDY, system="w9")
    seen = contexts(monkeypatch, speaker)
    for number in range(6):
        conversation.hear(f"w{number} w{number} w{number}")
    assert all(text.startswith("w9 <user>") for text in seen)
    assert all(len(text.split()) + GREEDY.max_new_tokens <= 32 for text in seen)
    assert seen[1].startswith("w9 <user> w0")  # as long as it fits, nothing goes
    assert not seen[-1].startswith("w9 <user> w0")
    assert "(2 of the oldest messages no longer fit and are left out.)" in capsys.readouterr().out


def test_a_message_that_is_too_long_changes_nothing(ckpt, capsys):
    conversation = Conversation(load_language_model(ckpt, None, None), GREEDY)
    conversation.hear("w1")
    turns = list(conversation.turns)
    conversation.hear("w1 " * 30)
    assert conversation.turns == turns
    assert "too long for the model" in capsys.readouterr().out


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt(), "/exit"])
def test_leaves_when_asked(ckpt, monkeypatch, capsys, end):
    waiting = type_in(monkeypatch, "w1", "", end, "w2")
    chat(ckpt, max_new_tokens=4)
    shown = capsys.readouterr().out
    assert shown.startswith(HELP)
    assert shown.count("model> ") == 1
    assert waiting == ["w2"]


def test_ctrl_c_during_an_answer_leaves_too(ckpt, monkeypatch):
    waiting = type_in(monkeypatch, "w1", "w2")

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_lightning.commands._language.model.LanguageModel.go_on", interrupted)
    chat(ckpt, max_new_tokens=4)
    assert waiting == ["w2"]


def test_a_seed_gives_the_same_answers_again(ckpt, monkeypatch, capsys):
    answers = []
    for seed in (1, 1, 2):
        type_in(monkeypatch, "w1", "w2")
        chat(ckpt, max_new_tokens=4, temperature=5.0, seed=seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_a_system_message_that_leaves_no_room_is_refused_before_anybody_types(ckpt, monkeypatch):
    waiting = type_in(monkeypatch, "w1")
    with pytest.raises(ConfigError, match="which the system message and an answer of 4 fill"):
        chat(ckpt, system="w1 " * 30, max_new_tokens=4)
    assert waiting == ["w1"]


def test_a_model_without_a_template_is_refused(tmp_path):
    base = save_language_model(tmp_path / "base", chat_template=None)
    with pytest.raises(ConfigError, match="has no chat template"):
        chat(backbone=str(base))


def test_unknown_commands_are_messages(ckpt, monkeypatch, capsys):
    conversation = Conversation(load_language_model(ckpt, None, None), GREEDY)
    conversation.hear("/help")
    assert capsys.readouterr().out == f"{HELP}\n"
    conversation.hear("/frobnicate")
    assert conversation.turns[0]["content"] == "/frobnicate"
    assert command.HELP == HELP
