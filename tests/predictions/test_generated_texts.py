"""`predict` with `Seq2SeqLM` and `CausalLM`: what is written is what transformers generates with the merged model."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import transformers

from tests.commands.language_models import save_language_model
from tests.predictions.toys import fit, in_the_run, merged, predict, read_lines, write_lines
from tests.tasks.texts import save_t5

SOURCES = [("k", "banana"), ("j", ""), ("k", "banana"), ("l", 'c, "d"\ne'), ("m", "fig")]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generated(model, ids, most=8, ends=()):
    """Continue, or answer, token ids with transformers; the text without special tokens."""
    settings = {"do_sample": False, "max_new_tokens": most, "pad_token_id": 0}
    if ends:
        settings["eos_token_id"] = list(ends)
    output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)[0]
    return output[1:] if model.config.is_encoder_decoder else output[len(ids) :]


def test_answers_of_an_encoder_and_a_decoder():
    save_t5("base")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained("base")
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # as it is saved, it always says the same
    base.save_pretrained("base")
    pairs = pd.DataFrame({"source": [f"{one} {two}" for one in "abcdefgh" for two in "xyz"], "target": list("xyz") * 8})
    pairs.to_csv("train.csv", index=False)
    checkpoint = fit(
        *("--model=Seq2SeqLM", "--model.backbone=base", "--model.max_new_tokens=8", "--model.num_generated=0"),
        *("--data=Seq2SeqData", "--data.train=train.csv", "--data.prefix=say: "),
        lr=1e-4,
    )
    pd.DataFrame(SOURCES, columns=["id", "source"]).to_csv("new.csv", index=False)
    predict(checkpoint, "--data.predict=new.csv", "--data.eval_batch_size=2")
    rows = read_lines(in_the_run("predictions.jsonl"))
    assert [row["index"] for row in rows] == list(range(len(SOURCES)))
    assert [(row["id"], row["source"]) for row in rows] == SOURCES
    folder = merged(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()

    def answers(prefix):
        found = [generated(model, tokenizer(prefix + source)["input_ids"]) for _, source in SOURCES]
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]

    assert [row["generated"] for row in rows] == answers("say: ")
    assert any(row["generated"] for row in rows)
    assert answers("") != answers("say: ")  # control: the prefix comes from the saved run


CHATS = [
    {"id": 1, "messages": [{"role": "user", "content": "w1 w2"}]},
    {"id": 2, "messages": [{"role": "system", "content": "w9"}, {"role": "user", "content": "w4"}]},
    {
        "id": 3,
        "messages": [
            {"role": "user", "content": "w5"},
            {"role": "assistant", "content": "w6"},
            {"role": "user", "content": "w7"},
            {"role": "assistant", "content": "w8"},  # an answer that is there already
        ],
    },
]


def chat_model(*words, template="{{ 'x' }}"):
    save_language_model("base", chat_template=template)
    training = [
        {"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 2}"}]}
        for i in range(1, 25)
    ]
    return fit(
        *("--model=CausalLM", "--model.backbone=base", "--model.max_new_tokens=6", "--data=InstructionData"),
        *(f"--data.train={write_lines('train.jsonl', training)}", "--data.max_length=24", "--data.val_size=2", *words),
        lr=1e-4,
    )


def load_merged(checkpoint):
    folder = merged(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


TEMPLATE = (
    "{% for message in messages %}{{ '<user> ' if message.role != 'assistant' else '<model> ' }}"
    "{% generation %}{{ message.content }} <end> {% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<model> {% endif %}"
)


@pytest.mark.parametrize("packing", [False, True])
def test_answers_to_conversations_with_the_template_of_the_run(packing, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    checkpoint = chat_model("--data.template=own.jinja", f"--data.packing={packing}")
    (tmp_path / "own.jinja").unlink()  # the checkpoint knows it
    (tmp_path / "train.jsonl").unlink()
    predict(checkpoint, f"--data.predict={write_lines('new.jsonl', CHATS)}", "--data.eval_batch_size=2")
    rows = read_lines(in_the_run("predictions.jsonl"))
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [{name: row[name] for name in ("id", "messages")} for row in rows] == CHATS
    tokenizer, model = load_merged(checkpoint)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")]
    asked = [CHATS[0]["messages"], CHATS[1]["messages"], CHATS[2]["messages"][:3]]
    for row, messages in zip(rows, asked, strict=True):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = generated(model, ids, most=6, ends=ends)
        assert row["generated"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert row["prompt_text"] == tokenizer.decode(ids)
    first, last = rows[0], rows[-1]
    assert "w8" not in last["prompt_text"]
    assert first["prompt_text"] != last["prompt_text"]  # control


def test_prompts_without_answers_and_without_a_template():
    save_language_model("base", chat_template=None)
    training = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}"} for i in range(1, 25)]
    checkpoint = fit(
        *("--model=CausalLM", "--model.backbone=base", "--model.max_new_tokens=4", "--data=InstructionData"),
        *(f"--data.train={write_lines('train.jsonl', training)}", "--data.max_length=24", "--data.val_size=2"),
        lr=1e-4,
    )
    new = [{"prompt": "w3 w4", "id": 1}, {"text": "w7", "id": 2}, {"prompt": "w3", "completion": "w9", "id": 3}]
    predict(checkpoint, f"--data.predict={write_lines('new.jsonl', new)}", "--output=out.jsonl")
    rows = read_lines("out.jsonl")
    assert [row["id"] for row in rows] == [1, 2, 3]
    tokenizer, model = load_merged(checkpoint)
    for row, text in zip(rows, ("w3 w4", "w7", "w3"), strict=True):
        ids = tokenizer(text)["input_ids"]
        expected = generated(model, ids, most=4, ends=[tokenizer.eos_token_id])
        assert row["generated"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert len({row["generated"] for row in rows}) > 1  # control: they are different answers
