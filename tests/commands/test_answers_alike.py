"""Checkpoint, adapter folder, PEFT export, merged folder and transformers' pipeline give one answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from lora_lightning.__main__ import main
from lora_lightning.checkpoint import read_manifest
from lora_lightning.commands._language.model import load_language_model
from lora_lightning.commands._language.sampling import Sampling
from lora_lightning.merging import merge_checkpoint
from tests.commands.language_models import save_language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*trained on too"),  # what it has learnt is asked again, on purpose
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),  # peft asks transformers by an old name
]

# Ends a turn with a token that the base does not end with; the training passes an argument.
TEMPLATE = (
    "{% if brief %}{{ 'w9 ' }}{% endif %}"
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<model> ' }}{{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}{{ '<model> ' }}{% endif %}"
)
ASKED = [{"role": "user", "content": "w1"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on conversations with a template that the base does not have, then move the base and write everything."""
    folder = tmp_path_factory.mktemp("run")
    save_language_model(folder / "old", chat_template=None)
    (folder / "talk.jinja").write_text(TEMPLATE)
    answers = {"w1": "w2 w3", "w4": "w5 w6", "w7": "w8"}
    rows = [{"messages": [*turn(*one)]} for one in answers.items()] * 4
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model=CausalLM", f"--model.backbone={folder / 'old'}", "--model.method=LoRA", "--model.method.r=8"]
    words += ["--model.method.target_modules=all-linear", "--model.optim.lr=3e-2", "--data=InstructionData"]
    words += [f"--data.train={folder / 'talk.jsonl'}", f"--data.val={folder / 'talk.jsonl'}", "--data.duplicates=keep"]
    words += [f"--data.template={folder / 'talk.jinja'}", "--data.template_arguments.brief=true"]
    words += [f"--trainer.default_root_dir={folder}", "--trainer.max_epochs=30", "--trainer.accelerator=cpu"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    assert main(["fit", *words]) == 0
    (folder / "old").rename(folder / "base")
    (folder / "talk.jinja").unlink()
    given = [f"--ckpt_path={ckpt(folder)}", f"--backbone={folder / 'base'}"]
    assert main(["merge", *given, f"--output_dir={folder / 'merged'}"]) == 0
    assert main(["export", *given, f"--output_dir={folder / 'peft'}"]) == 0
    return folder


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ckpt(run: Path) -> Path:
    return run / "version_0/checkpoints/last.ckpt"


def answer(**source: str) -> str:
    speaker = load_language_model(source.get("ckpt_path"), source.get("adapter_dir"), source.get("backbone"))
    assert speaker.answers
    sampling = Sampling(max_new_tokens=8, temperature=0, top_p=1, top_k=0)
    return speaker.go_on(speaker.encode_chat(ASKED), sampling, seed=0, is_chat=True).strip()


def test_all_ways_give_one_answer(run: Path) -> None:
    base = str(run / "base")
    answers = {
        "checkpoint": answer(ckpt_path=str(ckpt(run)), backbone=base),
        "folder": answer(adapter_dir=str(ckpt(run).with_suffix("")), backbone=base),
        "export": answer(adapter_dir=str(run / "peft"), backbone=base),
        "export names the base": answer(adapter_dir=str(run / "peft")),
        "merged": answer(backbone=str(run / "merged")),
    }
    assert set(answers.values()) == {"w2 w3"}


def test_a_pipeline_answers_and_stops_alike(run: Path) -> None:
    pipe = pipeline("text-generation", model=str(run / "merged"), device="cpu")
    said = pipe(ASKED, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert said[-1] == {"role": "assistant", "content": "w2 w3"}
    base = pipeline("text-generation", model=str(run / "base"), tokenizer=str(run / "merged"), device="cpu")
    other = base(ASKED, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert other[-1] != said[-1]  # negative control


def test_peft_answers_alike(run: Path) -> None:
    folder = run / "peft"
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(run / "base")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    settings = json.loads((folder / "generation_config.json").read_text())
    output = model.generate(**ids, max_new_tokens=8, do_sample=False, eos_token_id=settings["eos_token_id"])
    said = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == "w2 w3"


def test_end_tokens_are_in_the_generation_config(run: Path) -> None:
    ends = json.loads((run / "merged" / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer.convert_tokens_to_ids("<end>") in ends
    assert tokenizer.eos_token_id in ends
    assert tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True).startswith("w9 <user>")


def test_the_checkpoint_alone_is_enough(run: Path, tmp_path: Path) -> None:
    shutil.copy(ckpt(run), tmp_path / "alone.ckpt")
    assert answer(ckpt_path=str(tmp_path / "alone.ckpt"), backbone=str(run / "base")) == "w2 w3"
    report = merge_checkpoint(tmp_path / "alone.ckpt", tmp_path / "merged", backbone=str(run / "base"))
    assert report.has_tokenizer
    assert answer(backbone=str(tmp_path / "merged")) == "w2 w3"


def test_a_moved_base_is_named_by_the_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("merge", "export", "generate"):
        words = ["--prompt=w1"] if command == "generate" else [f"--output_dir={tmp_path / command}"]
        assert main([command, f"--ckpt_path={ckpt(run)}", *words]) == 2
        assert "old' does not exist" in (error := capsys.readouterr().err)
        assert "--backbone" in error
        assert not (tmp_path / command).exists()


def test_another_base_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "base")
    model.model.layers[0].self_attn.q_proj.weight.data.add_(1)
    model.save_pretrained(tmp_path / "other")
    words = [f"--ckpt_path={ckpt(run)}", f"--backbone={tmp_path / 'other'}", f"--output_dir={tmp_path / 'out'}"]
    for command in ("merge", "export"):
        assert main([command, *words]) == 2
        assert "was trained on another base model" in capsys.readouterr().err


def test_merging_the_same_checkpoint_again_replaces_the_result(run: Path, tmp_path: Path) -> None:
    target, base = tmp_path / "merged", str(run / "base")
    merge_checkpoint(ckpt(run), target, backbone=base)
    before = read_manifest(target)
    merge_checkpoint(ckpt(run), target, backbone=base)
    assert read_manifest(target).files == before.files
    (target / "notes.txt").write_text("mine")
    with pytest.raises(Exception, match="exists already"):
        merge_checkpoint(ckpt(run), target, backbone=base)
    assert (target / "notes.txt").read_text() == "mine"
