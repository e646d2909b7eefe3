"""`generate` answers with models that have an encoder, from a checkpoint, an adapter folder and a base."""

from __future__ import annotations

import pytest
import torch
import transformers

from lora_lightning.__main__ import main
from lora_lightning.adapters import disabled, iter_roles
from lora_lightning.checkpoint import write_adapter_folder
from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.commands._language.model import load_language_model
from lora_lightning.commands._language.sampling import Sampling
from lora_lightning.commands.chat import chat
from lora_lightning.commands.generate import generate
from lora_lightning.data import Seq2SeqData
from lora_lightning.errors import ConfigError
from lora_lightning.methods import LoRA
from lora_lightning.tasks import Seq2SeqLM
from tests.commands.language_models import save_language_model
from tests.tasks.toys import trainer

PROMPT = "w1 w2 w3"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small T5 with a tokenizer, a checkpoint of an adapter on it, and its folder."""
    folder = tmp_path_factory.mktemp("t5")
    save_language_model(folder / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        initializer_factor=3.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "base")
    rows = [{"source": f"w{index} w{index + 1}", "target": f"w{index + 2}"} for index in range(1, 9)]
    data = Seq2SeqData(
        rows, source_column="source", target_column="target", prefix="w9 ", val_size=2, test_size=0, batch_size=4
    )
    task = Seq2SeqLM(str(folder / "base"), method=LoRA(r=4, target_modules=["q", "v"]), num_generated=0)
    run = trainer(max_epochs=1)
    run.fit(task, data)
    with torch.no_grad():
        for _, parameter, _ in iter_roles(task.adapted):
            parameter.add_(torch.randn_like(parameter))
    run.save_checkpoint(folder / "x.ckpt")
    write_adapter_folder(folder / "adapter", task.adapted, RunFacts(base=str(folder / "base")))
    return folder, task.eval(), tokenizer


def expected(task, tokenizer, text, count=6, **settings):
    ids = tokenizer(text, return_tensors="pt")
    output = task.adapted.generate(**ids, max_new_tokens=count, do_sample=False, **settings)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def test_a_checkpoint_answers_with_the_prefix_of_its_training(runs, capsys):
    folder, task, tokenizer = runs
    generate(str(folder / "x.ckpt"), prompt=PROMPT, max_new_tokens=6)
    shown = capsys.readouterr().out.strip()
    assert shown == expected(task, tokenizer, f"w9 {PROMPT}").strip() != ""
    with disabled(task.adapted):
        assert expected(task, tokenizer, f"w9 {PROMPT}") != shown
    assert expected(task, tokenizer, "w9 w30 w31") != shown


def test_an_adapter_folder_and_a_base_answer_too(runs, capsys):
    folder, task, tokenizer = runs
    generate(adapter_dir=str(folder / "adapter"), prompt=PROMPT, max_new_tokens=6)
    assert capsys.readouterr().out.strip() == expected(task, tokenizer, PROMPT).strip()
    generate(backbone=str(folder / "base"), prompt=PROMPT, max_new_tokens=6)
    with disabled(task.adapted):
        assert capsys.readouterr().out.strip() == expected(task, tokenizer, PROMPT).strip()


def test_the_command_compares_with_the_base(runs, capsys):
    folder, _, _ = runs
    ckpt = folder / "x.ckpt"
    assert main(["generate", f"--ckpt_path={ckpt}", "--prompt", PROMPT, "--compare-base", "--max-new-tokens=4"]) == 0
    assert "with the adapter" in capsys.readouterr().out


def test_draws_start_from_their_seed(runs):
    folder, _, _ = runs
    speaker = load_language_model(str(folder / "x.ckpt"), None, None)
    sampling = Sampling(max_new_tokens=8, temperature=2.0, top_p=1.0, top_k=0)
    drawn = [speaker.go_on(speaker.encode(PROMPT), sampling, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_base_whose_settings_search_with_beams_shows_the_best_of_them(runs):
    folder, task, tokenizer = runs
    speaker = load_language_model(str(folder / "x.ckpt"), None, None)
    speaker.model.generation_config.num_beams = 8
    sampling = Sampling(max_new_tokens=6, temperature=0.0, top_p=1.0, top_k=0)
    texts, prompts = [], [f"w{index} w{index + 3}" for index in range(1, 9)]
    for prompt in prompts:
        shown: list[str] = []
        texts.append(speaker.go_on(speaker.encode(prompt), sampling, seed=0, write=shown.append))
        assert shown == [texts[-1]]
    assert texts == [expected(task, tokenizer, f"w9 {prompt}", num_beams=8) for prompt in prompts]
    assert texts != [expected(task, tokenizer, f"w9 {prompt}") for prompt in prompts]  # negative control


def test_it_holds_no_conversation(runs):
    with pytest.raises(ConfigError, match=r"holds no conversation\. Use lora-lightning generate"):
        chat(str(runs[0] / "x.ckpt"))
