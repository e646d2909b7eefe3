"""`generate` writes on from prompts, shows the base beside the adapter, and refuses what cannot work in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_lightning.__main__ import main
from lora_lightning.adapters import disabled
from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.backbones.tokenizer_identity import tokenizer_fingerprint
from lora_lightning.checkpoint import write_adapter_folder
from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.commands._language.columns import Columns
from lora_lightning.commands._language.model import load_language_model
from lora_lightning.commands._language.sampling import Sampling
from lora_lightning.commands.generate import generate
from lora_lightning.errors import BackboneError, CheckpointError, ConfigError
from lora_lightning.methods import LoRA
from lora_lightning.tasks import SequenceClassification
from tests.checkpoint.runs import rebuild_task, save_backbone, save_checkpoint
from tests.commands.language_models import END_OF_TURN, save_language_model, save_lm_checkpoint

PROMPT = "w1 w2 w3"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_language_model(folder / "base")
    save_lm_checkpoint(folder / "base", folder / "x.ckpt")
    return folder


def ckpt(lm):
    return str(lm / "x.ckpt")


@torch.no_grad()
def greedy(model, ids, count, ends=(2,)):
    """Go on from ids by hand, taking the likeliest token each time."""
    ids = list(ids)
    start = len(ids)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[start:]


def test_writes_what_the_adapted_model_finds_likeliest(lm, capsys):
    generate(ckpt(lm), prompt=PROMPT, max_new_tokens=6)
    shown = capsys.readouterr().out
    task = rebuild_task(lm / "x.ckpt").eval()
    tokenizer = load_language_model(None, None, str(lm / "base")).tokenizer
    ids = tokenizer(PROMPT)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert shown.strip() == tokenizer.decode(greedy(task.adapted, ids, 6), skip_special_tokens=True).strip() != ""


def test_compare_base_shows_both_beside_each_other(lm, capsys, tmp_path):
    assert main(["generate", f"--ckpt_path={ckpt(lm)}", "--prompt", PROMPT, "--max-new-tokens=6", "--compare-base",
                 f"--output-file={tmp_path / 'out.jsonl'}"]) == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    task = rebuild_task(lm / "x.ckpt").eval()
    tokenizer = load_language_model(None, None, str(lm / "base")).tokenizer
    ids = tokenizer(PROMPT)["input_ids"]
    with disabled(task.adapted):
        base = tokenizer.decode(greedy(task.adapted, ids, 6), skip_special_tokens=True)
    assert rows == [{"prompt": PROMPT, "generated": rows[0]["generated"], "base": base}]
    assert rows[0]["generated"] != base
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [half.strip() for half in lines[0]] == ["base", "with the adapter"]
    assert " ".join(left.strip() for left, _ in lines[1:]) == base
    assert " ".join(right.strip() for _, right in lines[1:]) == rows[0]["generated"]


def test_an_adapter_folder_answers_as_its_checkpoint(lm, capsys, tmp_path):
    task = rebuild_task(lm / "x.ckpt")
    write_adapter_folder(tmp_path / "adapter", task.adapted, RunFacts(base=str(lm / "base")))
    answers = []
    for source in ({"ckpt_path": ckpt(lm)}, {"adapter_dir": str(tmp_path / "adapter")}, {"backbone": str(lm / "base")}):
        generate(**source, prompt=PROMPT, max_new_tokens=6)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_an_adapter_folder_is_not_used_with_another_tokenizer(lm, tmp_path):
    task, tokenizer = rebuild_task(lm / "x.ckpt"), load_tokenizer(str(lm / "base"))
    facts = RunFacts(base=str(lm / "base"), tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    write_adapter_folder(tmp_path / "adapter", task.adapted, facts)
    generate(adapter_dir=str(tmp_path / "adapter"), prompt=PROMPT, max_new_tokens=1)  # negative control
    shutil.copytree(lm / "base", tmp_path / "other")
    words = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(words.replace('"w3"', '"w03"'))
    with pytest.raises(CheckpointError, match=r"adapter was trained with another tokenizer: .*other has"):
        generate(adapter_dir=str(tmp_path / "adapter"), backbone=str(tmp_path / "other"), prompt=PROMPT)


def test_a_folder_of_peft_needs_a_base_that_it_or_the_user_names(lm, capsys, tmp_path):
    folder = tmp_path / "adapter"
    write_adapter_folder(folder, rebuild_task(lm / "x.ckpt").adapted)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    answers = []
    for base, task_type, settings in (
        (str(lm / "base"), None, {}),
        (None, "CAUSAL_LM", {"backbone": str(lm / "base")}),
    ):
        named = {**config, "base_model_name_or_path": base, "task_type": task_type}
        (folder / "adapter_config.json").write_text(json.dumps(named))
        generate(adapter_dir=str(folder), prompt=PROMPT, max_new_tokens=6, **settings)
        answers.append(capsys.readouterr().out)
    generate(ckpt(lm), prompt=PROMPT, max_new_tokens=6)
    assert answers == [capsys.readouterr().out] * 2
    with pytest.raises(CheckpointError, match="does not say which base it is for; name it with --backbone"):
        generate(adapter_dir=str(folder), prompt=PROMPT)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises(CheckpointError, match="is for the task SEQ_CLS"):
        generate(adapter_dir=str(folder), prompt=PROMPT)


def test_prompts_come_from_a_file_one_a_line(lm, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("w1\n\nw2 w3\n")
    (tmp_path / "prompts.jsonl").write_text('"w1"\n{"prompt": "w2 w3"}\n')
    shown = []
    for name in ("prompts.txt", "prompts.jsonl"):
        generate(ckpt(lm), prompts_file=str(tmp_path / name), max_new_tokens=3)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert [line for line in shown[0].splitlines() if line.startswith(">")] == ["> w1", "> w2 w3"]


def test_drawing_depends_on_the_seed_alone(lm, capsys):
    answers = []
    for seed in (1, 1, 2):
        torch.rand(1)  # what happened before does not matter
        generate(ckpt(lm), prompt=PROMPT, max_new_tokens=12, temperature=5.0, seed=seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    generate(ckpt(lm), prompt=PROMPT, max_new_tokens=6, temperature=5.0, top_k=1, seed=3)
    drawn = capsys.readouterr().out
    generate(ckpt(lm), prompt=PROMPT, max_new_tokens=6)
    assert capsys.readouterr().out == drawn  # of the one likeliest token there is nothing to draw


def test_chat_lays_the_prompt_out_and_ends_with_the_turn(lm):
    speaker = load_language_model(ckpt(lm), None, None)
    ids = speaker.encode_chat([{"role": "user", "content": "w1"}])
    assert speaker.tokenizer.decode(ids) == "<user> w1 <end> <model>"
    assert speaker.stops(is_chat=True) == [2, END_OF_TURN]
    assert speaker.stops(is_chat=False) == [2]


def speaker_of(folder, **data_settings):
    """Load a checkpoint whose data module had some settings."""
    path = folder / "data.ckpt"
    checkpoint = torch.load(folder / "x.ckpt", weights_only=True)
    torch.save({**checkpoint, "datamodule_hyper_parameters": data_settings}, path)
    return load_language_model(str(path), None, None)


@pytest.mark.parametrize(
    ("data_settings", "answers", "laid_out"),
    [
        ({"template": "dialogue"}, True, "<s>User: w1\nAssistant:"),
        ({"template": None}, True, "<user> w1 <end> <model> "),  # the tokenizer's own
        ({"template": "plain"}, False, "<s>w1\n"),
        ({}, False, "<user> w1 <end> <model> "),
    ],
)
def test_the_template_of_the_training_is_used_again(lm, data_settings, answers, laid_out):
    speaker = speaker_of(lm, **data_settings)
    assert speaker.answers is answers
    said = [{"role": "user", "content": "w1"}]
    settings = {"chat_template": speaker.chat_template, "add_generation_prompt": True, "tokenize": False}
    assert speaker.tokenizer.apply_chat_template(said, **settings) == laid_out
    assert speaker.encode_chat(said) == speaker.tokenizer(laid_out, add_special_tokens=False)["input_ids"]


def test_a_template_can_be_named(lm, capsys):
    answers = []
    for template in (None, "dialogue"):
        speaker = load_language_model(None, None, str(lm / "base"), template=template)
        answers.append((speaker.answers, "User:" in speaker.chat_template))
    assert answers == [(False, False), (True, True)]
    with pytest.raises(ConfigError, match="Did you mean 'chatml'"):
        generate(ckpt(lm), prompt="w1", template="chatlm")


def test_an_end_token_ends_the_answer(lm, capsys):
    speaker = load_language_model(ckpt(lm), None, None)
    ids = speaker.encode(PROMPT)
    likeliest = greedy(speaker.model, ids, 4, ends=())
    speaker.tokenizer.eos_token = speaker.tokenizer.convert_ids_to_tokens(likeliest[2])
    sampling = Sampling(max_new_tokens=4, temperature=0, top_p=1, top_k=0)
    pieces: list[str] = []
    text = speaker.go_on(ids, sampling, seed=0, write=pieces.append)
    assert text == speaker.tokenizer.decode(likeliest[: likeliest.index(likeliest[2])], skip_special_tokens=True)
    assert "".join(pieces).strip() == text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({}, "There is no prompt"),
        ({"prompt": "w1", "prompts_file": "x"}, "Both --prompt and --prompts_file"),
        ({"prompts_file": "nowhere.txt"}, "There is no file of prompts 'nowhere.txt'"),
        ({"prompt": "w1", "temperature": -1.0}, "temperature is -1.0: expected at least 0"),
        ({"prompt": "w1", "top_p": 0.5}, "at temperature 0 none is drawn"),
        ({"prompt": "w1", "max_new_tokens": 0}, "max_new_tokens is 0: expected at least 1"),
        ({"prompt": "w1 " * 40}, "A prompt has 41 tokens, and the model takes 32"),
        ({"prompt": "w1", "adapter_dir": "x"}, "Both --ckpt_path and --adapter_dir"),
        ({"prompt": "w1", "output_file": "/nowhere/x.jsonl"}, "The folder of /nowhere/x.jsonl does not exist"),
        ({"prompt": "w1", "output_file": __file__}, "exists already"),
        ({"prompt": "w1", "ckpt_path": None, "compare_base": True}, "No model is named"),
    ],
)
def test_a_mistake_is_a_sentence(lm, settings, words):
    with pytest.raises(ConfigError) as caught:
        generate(**{"ckpt_path": ckpt(lm), **settings})
    assert words in str(caught.value)


def test_malformed_lines_name_their_place(lm, tmp_path):
    path = tmp_path / "p.jsonl"
    for line, words in (("{", "line 2: not valid JSON"), ('{"text": "w1"}', "line 2: expected a JSON string")):
        path.write_text(f'"w1"\n{line}\n')
        with pytest.raises(ConfigError, match=words):
            generate(ckpt(lm), prompts_file=str(path))


def test_chat_without_a_template_is_refused(tmp_path):
    save_language_model(tmp_path / "base", chat_template=None)
    save_lm_checkpoint(tmp_path / "base", tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="has no chat template"):
        generate(str(tmp_path / "x.ckpt"), prompt="w1", chat=True)


def test_what_is_no_language_model_is_refused(tmp_path):
    base = save_backbone(tmp_path / "bert")
    task = SequenceClassification(backbone=str(base), method=LoRA(r=2), label_names=["a", "b", "c"])
    save_checkpoint(task, tmp_path / "x.ckpt")
    write_adapter_folder(tmp_path / "adapter", task.adapted, RunFacts(base=str(base), label_names=["a", "b", "c"]))
    with pytest.raises(CheckpointError, match="written by SequenceClassification, whose model does not write text"):
        generate(str(tmp_path / "x.ckpt"), prompt="w1")
    with pytest.raises(CheckpointError, match="trained to tell 3 labels apart"):
        generate(adapter_dir=str(tmp_path / "adapter"), prompt="w1")
    with pytest.raises(BackboneError, match="is not a language model"):
        generate(backbone=str(base), prompt="w1")
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        generate(adapter_dir=str(base), prompt="w1")


def test_a_base_alone_has_nothing_to_compare(lm):
    with pytest.raises(ConfigError, match="compare_base needs an adapter"):
        generate(backbone=str(lm / "base"), prompt="w1", compare_base=True)


def test_rows_appear_once_their_right_half_is_complete():
    rows: list[str] = []
    columns = Columns("a b c d", 9, rows.append)  # halves of three characters
    columns.write("one")
    assert rows == []
    columns.write(" two")
    assert rows == ["a b | one"]
    columns.close()
    assert rows == ["a b | one", "c d | two"]
    columns = Columns("", 9, rows.append)
    columns.close()
    assert rows[2:] == ["    |"]


def test_answers_so_far_are_kept_when_interrupted(lm, tmp_path, monkeypatch):
    answers = iter([{"generated": "w1"}])

    def answer(*arguments):
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("lora_lightning.commands.generate._stream", answer)
    (tmp_path / "p.txt").write_text("w1\nw2\n")
    output = Path(tmp_path / "out.jsonl")
    files = [f"--prompts_file={tmp_path / 'p.txt'}", f"--output_file={output}"]
    assert main(["generate", f"--ckpt_path={ckpt(lm)}", *files]) == 130
    assert json.loads(output.read_text()) == {"prompt": "w1", "generated": "w1"}
