"""`generate` in batches gives each prompt what it gets alone, and stop texts and penalties do what transformers' do."""

from __future__ import annotations

import json
import logging

import pandas as pd
import pytest
import torch
import transformers

from lora_lightning.__main__ import main
from lora_lightning.backbones.load import load_backbone
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.commands._language.model import LanguageModel, load_language_model
from lora_lightning.commands._language.sampling import Sampling
from lora_lightning.commands.generate import generate
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.tasks import generation
from lora_lightning.tasks.decoding import Draws
from lora_lightning.tasks.generation import batching_of
from tests import models
from tests.checkpoint.runs import save_wide_base
from tests.commands.language_models import save_language_model, save_lm_checkpoint

PROMPTS = ["w1", "w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11"]
IDS = [[1, 8], [1, 9, 10, 11, 12, 13], [1, 14, 15], [1, 16, 17, 18]]
ROWS = range(len(IDS))


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_language_model(folder / "base")
    save_lm_checkpoint(folder / "base", folder / "x.ckpt")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def bart():
    config = transformers.BartConfig(
        vocab_size=models.VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).eval()


BUILDERS = {name: lambda name=name: models.build(name) for name in ("llama", "gpt2", "gemma3", "nemotron_h", "t5")}
BUILDERS["bart"] = bart


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "seed": 5}, {"repetition_penalty": 3.0}],
    ids=["likeliest", "drawn", "penalized"],
)
def test_a_batch_answers_as_its_prompts_alone(name, settings):
    model = BUILDERS[name]()
    assert batching_of(model, IDS[0]) == batching_of(model, IDS[1]) == "any"
    alone = [generation.generate(model, [ids], max_new_tokens=10, **settings)[0] for ids in IDS]
    assert generation.generate(model, IDS, max_new_tokens=10, **settings) == alone
    assert len({tuple(answer) for answer in alone}) > 1


@pytest.mark.filterwarnings("ignore:.*(_check_is_size|kernels).*")
@pytest.mark.parametrize("settings", [Quantization(), Quantization(bits=8)], ids=["nf4", "int8"])
def test_a_quantized_model_answers_a_batch_as_its_prompts_alone(tmp_path, settings):
    folder = save_wide_base("llama", tmp_path / "base")
    model = load_backbone(str(folder), "AutoModelForCausalLM", quantization=settings).model
    assert batching_of(model, IDS[0]) == "any"
    alone = [generation.generate(model, [ids], max_new_tokens=6)[0] for ids in IDS]
    assert generation.generate(model, IDS, max_new_tokens=6) == alone


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_control_padding_that_counts_changes_answers(name, monkeypatch):
    model = BUILDERS[name]()
    alone = [generation.generate(model, [ids], max_new_tokens=10)[0] for ids in IDS]
    padded = generation._padded

    def on_the_other_side(*arguments, on_the_left):
        return padded(*arguments, on_the_left=not on_the_left)

    monkeypatch.setattr(generation, "_padded", on_the_other_side)
    assert generation.generate(model, IDS, max_new_tokens=10) != alone


class Leaky(transformers.LlamaForCausalLM):
    """A language model that ignores the mask, or adds what the first row of a batch has to all rows."""

    mixes = False

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **settings):
        output = super().forward(input_ids, **settings)
        if self.mixes:
            output.logits = output.logits + output.logits.mean(0, keepdim=True)
        return output


@pytest.mark.parametrize(("mixes", "batching"), [(False, "same length"), (True, "alone")])
def test_a_model_that_other_rows_change_gets_other_batches(lm, caplog, mixes, batching):
    model = Leaky.from_pretrained(lm / "base").eval()
    model.mixes = mixes
    assert batching_of(model, IDS[0]) == batching_of(model, IDS[1]) == batching
    speaker = LanguageModel(model, load_language_model(None, None, str(lm / "base")).tokenizer, "leaky")
    sampling = Sampling(max_new_tokens=8, temperature=0, top_p=1, top_k=0)
    prompts = [*IDS, [1, 20], [1, 21]]
    alone = [speaker.go_on(ids, sampling, seed=0) for ids in prompts]
    with caplog.at_level(logging.WARNING):
        assert speaker.go_on_all(prompts, sampling, seed=0) == alone
    assert "Other prompts of a batch change what leaky answers" in caplog.text
    together = generation.generate(model, prompts, max_new_tokens=8)
    assert [speaker.tokenizer.decode(ids, skip_special_tokens=True) for ids in together] != alone  # negative control


def test_a_model_of_transformers_that_mixes_rows_is_found_out():
    config = transformers.RwkvConfig(
        vocab_size=models.VOCABULARY, context_length=32, hidden_size=32, num_hidden_layers=2, intermediate_size=48
    )
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    assert batching_of(model, IDS[0]) == "alone"


def test_prompts_with_less_room_do_not_shorten_the_others(lm):
    speaker = load_language_model(str(lm / "x.ckpt"), None, None)
    sampling = Sampling(max_new_tokens=20, temperature=0, top_p=1, top_k=0)
    prompts = [[1, *[9] * 27], IDS[0]]
    alone = [speaker.go_on(ids, sampling, seed=0) for ids in prompts]
    together = generation.generate(speaker.model, prompts, max_new_tokens=20)
    assert len(together[1]) <= 4 < len(alone[1].split())  # negative control
    assert speaker.go_on_all(prompts, sampling, seed=0) == alone


def test_drawn_tokens_have_the_probabilities_of_the_model():
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    settings = {"temperature": 1.7, "top_p": 1.0, "top_k": 5, "device": scores.device}
    drawn = [int(Draws(1, seed, **settings)(torch.tensor([[0]]), scores).argmax()) for seed in range(2000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=40) / len(drawn)
    tempered = scores[0] / 1.7
    kept = tempered.topk(5).indices
    expected = torch.zeros(40).scatter(0, kept, tempered[kept].softmax(0))
    assert float((shares - expected).abs().sum() / 2) < 0.04
    assert float((shares - tempered.softmax(0)).abs().sum() / 2) > 0.2  # negative control: without top_k


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_penalty_is_that_of_transformers(name):
    model = BUILDERS[name]()
    found, expected, plain = [], [], []
    for ids in IDS:
        rows = torch.tensor([ids])
        settings = {
            "attention_mask": torch.ones_like(rows),
            "max_new_tokens": 10,
            "do_sample": False,
            "pad_token_id": 2,
        }
        start = 1 if name == "t5" else len(ids)
        for answers, penalty in ((expected, 2.5), (plain, 1.0)):
            output = model.generate(rows, repetition_penalty=penalty, **settings)[0, start:].tolist()
            answers.append(output[: output.index(2)] if 2 in output else output)
        found.append(generation.generate(model, [ids], max_new_tokens=10, repetition_penalty=2.5, stop=[2])[0])
    assert found == expected != plain


def texts_of(capsys):
    return [json.loads(line)["generated"] for line in capsys.readouterr().out.splitlines()]


def test_the_command_writes_the_same_rows_for_any_batch_size(lm, capsys, tmp_path):
    command = ["generate", f"--ckpt_path={lm / 'x.ckpt'}", f"--prompts_file={lm / 'prompts.txt'}", "--max-new-tokens=6"]
    rows = []
    for size in (1, 3):
        output = tmp_path / f"{size}.jsonl"
        assert main([*command, f"--batch_size={size}", "--compare-base", f"--output_file={output}"]) == 0
        shown = capsys.readouterr().out
        assert [line for line in shown.splitlines() if line.startswith(">")] == [f"> {prompt}" for prompt in PROMPTS]
        rows.append([json.loads(line) for line in output.read_text().splitlines()])
    assert rows[0] == rows[1]
    assert all(row["generated"] != row["base"] for row in rows[0])
    assert main([*command, "--batch_size=2", "--compare-base", "--output_file=-"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows[0]


def test_a_table_of_prompts_gives_the_answers_of_a_list(lm, capsys, tmp_path):
    table = pd.DataFrame({"id": range(len(PROMPTS)), "prompt": PROMPTS})
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_parquet(tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text(table.to_json(orient="records"))
    settings = {"ckpt_path": str(lm / "x.ckpt"), "max_new_tokens": 4, "batch_size": 4, "output_file": "-"}
    generate(prompts_file=str(lm / "prompts.txt"), **settings)
    expected = capsys.readouterr().out
    for name in ("p.csv", "p.parquet", "p.json"):
        generate(prompts_file=str(tmp_path / name), **settings)
        assert capsys.readouterr().out == expected
    table.rename(columns={"prompt": "text"}).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ConfigError, match=r"line 2: expected a column 'prompt', found 'id', 'text'"):
        generate(prompts_file=str(tmp_path / "other.csv"), **settings)
    (tmp_path / "empty.csv").write_text("id,prompt\n0,\n")
    with pytest.raises(ConfigError, match="that is a text and not empty"):
        generate(prompts_file=str(tmp_path / "empty.csv"), **settings)
    (tmp_path / "none.csv").write_text("prompt\n")
    with pytest.raises(DataError, match="holds no rows"):
        generate(prompts_file=str(tmp_path / "none.csv"), **settings)


def test_an_answer_ends_before_a_stop_text(lm, capsys):
    settings = {"ckpt_path": str(lm / "x.ckpt"), "max_new_tokens": 12, "temperature": 5.0}
    generate(prompts_file=str(lm / "prompts.txt"), output_file="-", **settings)
    whole = texts_of(capsys)
    words = [text.split() for text in whole]
    stops = [f"{words[0][3]} {words[0][4]}", words[1][2]]
    cut = [text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))] for text in whole]
    assert cut != whole
    for size in (1, 4):
        generate(prompts_file=str(lm / "prompts.txt"), output_file="-", stop=stops, batch_size=size, **settings)
        assert texts_of(capsys) == cut
    command = ["generate", f"--ckpt_path={settings['ckpt_path']}", "--prompt", PROMPTS[0]]
    command += ["--max_new_tokens=12", "--temperature=5"]
    assert main([*command, "--stop", stops[0]]) == 0
    assert capsys.readouterr().out.strip() == whole[0][: whole[0].find(stops[0])].strip()
    assert main([*command, "--stop", json.dumps(stops)]) == 0
    assert capsys.readouterr().out.strip() == cut[0].strip()
    assert main([*command, "--stop", "###"]) == 0  # no comment of YAML
    assert capsys.readouterr().out.strip() == whole[0].strip()


def test_a_stop_text_ends_the_computation(lm):
    speaker = load_language_model(str(lm / "x.ckpt"), None, None)
    settings = {"max_new_tokens": 20, "temperature": 5, "top_p": 1, "top_k": 0}
    whole = generation.generate(speaker.model, [IDS[0]], max_new_tokens=20, temperature=5, stop=[2])[0]
    third = speaker.tokenizer.decode(whole[3])
    calls = []
    speaker.model.register_forward_hook(lambda *_: calls.append(1))
    speaker.go_on(IDS[0], Sampling(**settings, stop=[third]), seed=0)
    assert len(calls) == whole.index(whole[3]) + 1
    calls.clear()
    speaker.go_on(IDS[0], Sampling(**settings), seed=0)
    assert len(calls) == 20


def test_a_special_token_may_be_a_stop_text(lm):
    speaker = load_language_model(str(lm / "x.ckpt"), None, None)
    ends = speaker.stops(is_chat=False)
    assert speaker.stops(is_chat=False, texts=["<end>", "w1", "nowhere"]) == [*ends, speaker.stops(is_chat=True)[-1]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0: expected above 0"),
        ({"stop": ["a", ""]}, "stop is ['a', '']: expected texts that are not empty"),
    ],
)
def test_a_mistake_is_a_sentence(lm, settings, words):
    with pytest.raises(ConfigError) as caught:
        generate(ckpt_path=str(lm / "x.ckpt"), prompt="w1", **settings)
    assert words in str(caught.value)
