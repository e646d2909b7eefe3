import itertools
import json
import re

import pytest
import torch

from lora_lightning.data import InstructionData
from lora_lightning.data.language.conversations import sample_of
from lora_lightning.errors import ConfigError, DataError, UserError
from lora_lightning.texts.chat_templates import chat_template
from tests.data.instruction_runs import PAIRS, Model, everything, fit
from tests.data.talk import learnt, llama_config, save_tokenizer, turns, write_lines

CHATTERBOT = "pkg://chatterbot_corpus/data/english"
# Without markers; what follows an answer's end is not the assistant's.
UNMARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts(data, split="train"):
    """Each sample as text and what of it is learnt, in the order of the file."""
    rows = data._encoded[split]
    return [
        (data.tokenizer.decode(one.ids), learnt(data.tokenizer, one.ids, one.labels))
        for index in range(len(rows))
        for one in rows[index]
    ]


# What is learnt.


def test_prompts_and_completions_are_plainly_joined(build):
    data = build([{"prompt": "the question is ", "completion": "yes"}, {"prompt": "1+1=", "completion": "2"}])
    assert texts(data) == [("the question is yes<eos>", ["yes<eos>"]), ("1+1=2<eos>", ["2<eos>"])]
    # The blank before "yes" would be one token with it, and the model's prompt ends with the blank.
    alone = data.tokenizer("the question is ")["input_ids"]
    assert data._encoded["train"][0][0].ids[: len(alone)].tolist() == alone
    assert data.tokenizer("the question is yes")["input_ids"][: len(alone)] != alone  # control


def test_only_the_assistants_words_are_learnt(build):
    talk = turns("Hi", "Hello", "A?", "B", system="Be kind.")
    data = build([{"messages": talk}], template="chatml")
    assert texts(data)[0][1] == ["Hello<|im_end|>", "B<|im_end|><eos>"]
    assert texts(build([{"messages": talk}], template="dialogue"))[0] == (
        "Be kind.\nUser: Hi\nAssistant: Hello<eos>\nUser: A?\nAssistant: B<eos>",
        [" Hello<eos>", " B<eos>"],
    )
    everything = texts(build([{"messages": talk}], template="dialogue", train_on="all"))[0]
    assert everything[1] == [everything[0][1:]]  # all but the first token, which nothing predicts
    assert texts(build([{"text": "plain words"}]))[0] == ("plain words<eos>", ["lain words<eos>"])
    weighed = [*talk[:2], {**talk[2], "weight": 0}, *talk[3:]]
    assert texts(build([{"messages": weighed}], template="chatml"))[0][1] == ["B<|im_end|><eos>"]


def test_a_template_without_markers_gives_the_same_as_one_with_them(build, tmp_path):
    records = [{"messages": turns("Hi", "Hello", "A?", "B")}, {"messages": turns("Who?", "Me", "And")}]
    for name, template in {"marked": chat_template("chatml"), "unmarked": UNMARKED}.items():
        (tmp_path / name).mkdir()
        save_tokenizer(tmp_path / name, template=template, config=llama_config(eos_token_id=[2, 4]))
    with pytest.warns(UserWarning, match=r"ignored fields: turns after the last learnt answer \(1 rows\)"):
        marked, unmarked = (build(records, tokenizer=str(tmp_path / name)) for name in ("marked", "unmarked"))
    assert texts(marked) == texts(unmarked)
    # Where the model stops at <|im_end|> itself, no further end is learnt; what follows the last answer is left out.
    assert texts(marked)[0][1] == ["Hello<|im_end|>", "B<|im_end|>"]
    assert texts(marked)[1][0].endswith("Me<|im_end|>")


def test_a_template_that_hides_the_answers_is_refused(build, tmp_path):
    reverse = "{% for message in messages | reverse %}{{ message['content'] }}\n{% endfor %}"
    source = save_tokenizer(tmp_path, template=reverse, config=llama_config())
    with pytest.raises(DataError, match=r"line 1: the assistant's words cannot be told .* no assistant markers"):
        build([{"messages": turns("Hi", "Hello")}], tokenizer=source)
    assert texts(build([{"messages": turns("Hi", "Hello")}], tokenizer=source, train_on="all"))
    (tmp_path / "few").mkdir()
    marks_none = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    marks_none += "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    source = save_tokenizer(tmp_path / "few", template=marks_none, config=llama_config())
    with pytest.raises(DataError, match="marks 0 answers where the conversation has 1"):
        build([{"messages": turns("Hi", "Hello")}], tokenizer=source)
    with pytest.raises(DataError, match="refuses this conversation: it takes the roles system, user and assistant"):
        build([{"messages": [{"role": "tool", "content": "x"}, *turns("Hi", "Hello")]}], template="chatml")


def test_which_template_is_taken(build, tmp_path):
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 1: the tokenizer .* has no chat template.* set template to one of"
    ):
        build([{"messages": turns("Hi", "Hello")}])
    alpaca = [{"instruction": "Add.", "input": "1, 1", "output": "2"}]
    text, answers = texts(build(alpaca))[0]
    assert "### Input:\n1, 1\n\n### Response:\n2" in text
    assert answers == ["2<eos>"]
    source = save_tokenizer(tmp_path, template=UNMARKED, config=llama_config())
    pair = [{"prompt": "a", "completion": "b"}]
    assert texts(build(pair, tokenizer=source))[0][1] == ["b<|im_end|><eos>"]
    assert texts(build(pair, tokenizer=source, template="plain"))[0] == ("ab<eos>", ["b<eos>"])
    assert texts(build(pair, tokenizer=source, template="dialogue"))[0][0] == "User: a\nAssistant: b<eos>"
    with pytest.warns(UserWarning, match=r"writes <\|eot_id\|>, which .* does not know as one token"):
        build(pair, template="llama3")


def test_begin_and_end_tokens(build, tmp_path):
    begins = save_tokenizer(tmp_path, special=("bos", "eos", "pad"), begins=True, config=llama_config())
    assert texts(build([{"prompt": "a", "completion": "b"}], tokenizer=begins))[0] == ("<bos>ab<eos>", ["b<eos>"])
    data = build([{"messages": turns("a", "b")}], tokenizer=begins, template="dialogue")
    assert texts(data)[0][0] == "<bos>User: a\nAssistant: b<eos>"
    (tmp_path / "none").mkdir()
    none = save_tokenizer(tmp_path / "none", special=(), config=llama_config(eos_token_id=2))
    data = build([{"prompt": "a", "completion": "b"}], tokenizer=none)
    assert texts(data)[0] == ("ab<eos>", ["b<eos>"])  # the model's end, which also pads
    assert data.tokenizer.pad_token == "<eos>"
    none = save_tokenizer(tmp_path / "none", special=(), config=llama_config(eos_token_id=None))
    with (
        pytest.warns(UserWarning, match="no answer learns to end"),
        pytest.raises(DataError, match="neither a padding token nor an end token"),
    ):
        build([{"prompt": "a", "completion": "b"}], tokenizer=none)


# What is too long, or cannot be learnt.


def test_what_is_cut_is_counted_and_told(build):
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "bcdfghjklmnpqrtvwx"},
        {"prompt": "qwrtzpsdfgh", "completion": "b"},
    ]
    with pytest.warns(
        UserWarning, match=r"2 of 3 train rows of .* longer than 8 tokens and were cut; 1 rows were left out"
    ):
        data = build(records, max_length=8)
    assert texts(data) == [("ab<eos>", ["b<eos>"]), ("abcdfghj", ["bcdfghj"])]
    assert (data.counts["train"], data.counts["cut"], data.counts["answers_lost"]) == (2, 2, 1)
    with pytest.raises(
        DataError, match=r"All labels of the 1 train rows of .* are masked, so there is nothing to learn"
    ):
        build(records[2:], max_length=8)


def test_what_is_too_long_is_split_or_dropped(build):
    records = [{"prompt": "a", "completion": "bcdfghjklmnpqrtvwx"}, {"prompt": "a", "completion": "b"}]
    with pytest.warns(UserWarning, match="1 of 2 train rows of .* longer than 8 tokens and were split; 0 rows"):
        data = build(records, max_length=8, too_long="split")
    assert [text for text, _ in texts(data)] == ["abcdfghj", "klmnpqrt", "vwx<eos>", "ab<eos>"]
    with pytest.warns(UserWarning, match="were dropped; 1 rows were left out"):
        assert [text for text, _ in texts(build(records, max_length=8, too_long="drop"))] == ["ab<eos>"]
    with pytest.raises(ConfigError, match="too_long is 'keep': expected cut or drop or split"):
        build(too_long="keep")


@pytest.mark.parametrize("streaming", [False, True])
def test_ignored_fields_are_named_once(build, streaming):
    rows = [{"messages": turns(f"q{index}", "a"), "topic": "x"} for index in range(3)]
    with pytest.warns(UserWarning, match=r"train\.jsonl: ignored fields: topic \(3 rows\)\.") as told:
        list(build(rows, template="chatml", streaming=streaming).train_dataloader())
    assert len(told) == 1


def test_fields_ignored_by_records_and_by_the_template_are_named_together(build):
    rows = [{"messages": [{**turn, "name": "al"} for turn in turns(f"q{n}", "a")], "topic": "x"} for n in range(30)]
    with pytest.warns(UserWarning, match="ignored fields") as told:
        data = build(rows, template="chatml", val_size=10, stage=None)
    (message,) = [str(one.message) for one in told if "ignored" in str(one.message)]
    assert "topic (30 rows), messages[].name (30 rows)" in message
    assert data.ignored_fields == {"topic": 30, "messages[].name": 30}


def test_template_arguments_reach_the_template(build, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ mood }} " + UNMARKED)
    settings = {"template": str(tmp_path / "mine.jinja"), "records": [{"messages": turns("q", "a")}]}
    assert texts(build(**settings, template_arguments={"mood": "merry"}))[0][0].startswith("merry ")
    assert not texts(build(**settings))[0][0].startswith("merry")
    with pytest.raises(ConfigError, match=r"template_arguments sets 'moood', which the chat template .* does not read"):
        build(**settings, template_arguments={"moood": "merry"})


def test_the_models_limits(build, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"max_length is 1024, but .* takes at most 512 tokens"):
        build(max_length=1024)
    assert build()._encoder.max_length == 512
    small = save_tokenizer(tmp_path, config=llama_config(vocab_size=90))
    with pytest.raises(
        DataError, match=r"line 1: token \d+ .* is beyond the vocabulary of the model, which knows 90 tokens"
    ):
        build(tokenizer=small)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{broken", r"line 2: this is not valid JSON"),
        ({"messages": [{"content": "a"}]}, r"line 2, turn 1: the role is missing"),
        ({"messages": []}, r"line 2: the conversation is empty"),
        ({"messages": turns("a")}, r"line 2: no turn is the assistant's"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_lines_end_in_one_sentence(build, record, message, streaming):
    with pytest.raises(UserError, match=rf"train\.jsonl, {message}") as caught:
        build([PAIRS[0], record, PAIRS[1]], streaming=streaming, bad_rows="refuse")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 1}, "max_length is 1: expected a whole number of at least 2"),
        ({"train_on": "user"}, "train_on is 'user': expected assistant or last or all"),
        ({"padding_side": "top"}, "padding_side is 'top'"),
        ({"template": "chatlm"}, "Did you mean 'chatml'"),
        ({"val": "v.jsonl", "val_size": 3}, "val_size is 3, but val names rows of its own"),
        ({"streaming": True}, "streaming divides nothing"),
        ({"columns": {"promt": "q"}}, r"columns names the field 'promt'.* Did you mean 'prompt'"),
    ],
)
def test_settings_are_checked_before_anything_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        InstructionData("no/such.jsonl", **settings)


# Dividing.


def test_questions_stay_on_one_side(build):
    records = [{"prompt": f"Question {index % 12}", "completion": f"answer {index}"} for index in range(60)]
    data = build([*records, records[0]], val_size=0.2, test_size=10, stage=None)
    groups = {split: {sample_of(one, "").group for one in data._rows(split)} for split in ("train", "val", "test")}
    assert not groups["train"] & groups["val"]
    assert not groups["val"] & groups["test"]
    assert [data.counts[key] for key in ("train", "val", "test", "unused", "duplicates_dropped")] == [40, 10, 10, 0, 1]
    assert {split: len(those) for split, those in groups.items()} == {"train": 8, "val": 2, "test": 2}
    other = build([*records, records[0]], val_size=0.2, test_size=10, seed=1)
    assert other.fingerprint != data.fingerprint
    assert build([*records, records[0]], val_size=0.2, test_size=10, packing=True).fingerprint == data.fingerprint
    with pytest.raises(DataError, match="No rows can be had for val: rows with the same first question stay together"):
        build(records, val_size=3)


def test_leaks_from_sources_of_their_own_are_warned_of(build, tmp_path):
    other = write_lines(tmp_path / "val.jsonl", [*PAIRS[:2], {"prompt": "new", "completion": "b"}])
    with pytest.warns(UserWarning, match=r"2 of 3 rows of .*val\.jsonl have a first question .* trained on too"):
        data = build(val=other, val_size=None)
    assert data.counts["leaked"] == 2
    assert data.counts["val"] == 3


def test_chatterbots_pairs(tmp_path):
    tokenizer = save_tokenizer(tmp_path, config=llama_config(max_position_embeddings=4096))
    data = InstructionData(CHATTERBOT, tokenizer=tokenizer, template="dialogue")
    with (
        pytest.warns(UserWarning, match="1 of 2026 rows"),
        pytest.warns(UserWarning, match=r"ignored fields: a last statement without an answer \(43 rows\)"),
    ):
        data.setup("fit")
    assert (data.counts["rows_read"], data.counts["train"] + data.counts["val"]) == (2026, 898)
    train, val = ({sample_of(one, "").group for one in data._rows(split)} for split in ("train", "val"))
    assert not train & val
    assert re.fullmatch(r"User: .*\nAssistant: .*<eos>", texts(data, "val")[0][0], re.DOTALL)


# Batches.


def test_batches_hold_every_sample(build):
    plain = build()
    batches = list(plain.train_dataloader())
    assert set(batches[0]) == {"input_ids", "attention_mask", "labels"}
    assert len(batches) == 10
    packed = build(packing=True, max_length=64)
    rows = list(packed.train_dataloader())
    assert set(rows[0]) == {"input_ids", "position_ids", "labels"}
    assert sum(len(batch["labels"]) for batch in rows) < 20
    assert sorted(itertools.chain(*everything(rows))) == sorted(itertools.chain(*everything(batches)))
    left = next(iter(build(padding_side="left").train_dataloader()))
    assert (left["attention_mask"][:, -1] == 1).all()
    assert set(left) == {"input_ids", "attention_mask", "position_ids", "labels"}
    first, second = (list(build().train_dataloader()) for _ in range(2))
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:Total length of `list`")  # Lightning's, for val_size 0
def test_the_backbones_tokenizer_is_taken_and_every_epoch_has_its_order(build, folder):
    data = build(tokenizer=folder)
    data.tokenizer_name = None
    seen = fit(data, Model(folder)).seen
    epochs = [[ids for at, ids in seen if at == epoch] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert len(epochs[0]) == len(epochs[1]) == 10
    assert seen == fit(build(), Model(folder)).seen


class Bloomlike(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return input_ids


@pytest.mark.filterwarnings("ignore:Total length of `list`")
def test_models_without_positions(build, folder):
    with pytest.raises(ConfigError, match="Bloomlike takes no position_ids, so packed samples would see each other"):
        fit(build(packing=True), Model(folder, Bloomlike()))
    assert fit(build(padding_side="left"), Model(folder, Bloomlike())).seen  # control


def test_nothing_is_done_twice(build, monkeypatch):
    data = build(test_size=5)
    rows = data._encoded["train"]
    monkeypatch.setattr("lora_lightning.data.rows.road.read_records", None)
    data.setup("fit")
    data.setup("test")
    assert data._encoded["train"] is rows
    assert len(data._encoded["test"]) == 5
    assert len(list(data.test_dataloader())) == 2
    with pytest.raises(DataError, match=r"no rows to validate: val_size is 0\. Set it, or give a file as val"):
        data.setup("validate")
    with pytest.raises(ConfigError, match="call setup"):
        InstructionData("x.jsonl").train_dataloader()


def test_settings_are_plain(build, folder):
    kept = build(columns={"prompt": "prompt"}).hparams
    assert json.loads(json.dumps(dict(kept)))["columns"] == {"prompt": "prompt"}


def test_hub_data_sets(monkeypatch, folder):
    import datasets

    asked = []

    def load(*names):
        asked.append(names)
        return datasets.DatasetDict(
            train=datasets.Dataset.from_list(PAIRS), validation=datasets.Dataset.from_list(PAIRS)
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = InstructionData("owner/talk", subset="english", tokenizer=folder, val_size=4)
    data.prepare_data()
    assert asked == [("owner/talk", "english")]
    data.setup("fit")
    assert (data.counts["train"], data.counts["val"]) == (36, 4)
    with pytest.raises(ConfigError, match="streaming reads files, and train is the Hub data set 'owner/talk'"):
        InstructionData("owner/talk", streaming=True, val_size=0, tokenizer=folder).setup("fit")


def test_rows_of_which_all_answers_are_marked_are_told(build):
    marked = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]}
    with pytest.warns(UserWarning, match=r"^1 of 2 train rows of \S+ were left out: all of their answers are marked"):
        data = build([marked, {"messages": turns("q", "a")}], template="chatml")
    assert data.counts["answers_lost"] == 1
    with pytest.raises(DataError, match="nothing to learn: all of their answers are marked so"):
        build([marked], template="chatml")
