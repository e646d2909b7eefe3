"""What is learnt under the templates of the models in use, against conversations of the usual shapes."""

import warnings

import pytest
from transformers import AutoTokenizer

from lora_lightning.data.language.conversations import sample_from
from lora_lightning.data.language.encoding import Encoder
from lora_lightning.data.sources import Record
from lora_lightning.errors import DataError
from lora_lightning.texts.chat_templates import TEMPLATE_NAMES, chat_template
from tests.data.language import families
from tests.data.talk import learnt, save_tokenizer, turns

END_MARKS = ("<eos>", "<|im_end|>")
EXTRA = ("<|end|>", "<|return|>", "<|call|>", "<|eot_id|>", "<end_of_turn>", "</s>")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Rome"}}}
SHAPES = {
    "one": turns("q", "4"),
    "system": turns("q", "4", system="Be kind."),
    "two": turns("q", "4", "r", "6"),
    "second": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "4", "train": False},
        *turns("r", "6"),
    ],
    "reasoning": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"}],
    "tool": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sun."},
    ],
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.add_special_tokens({"additional_special_tokens": list(EXTRA)})
    marks = tokenizer.convert_tokens_to_ids([*END_MARKS, *EXTRA])

    def _build(template, **settings):
        # Every end mark is one at which the model stops, so that nothing is added behind it.
        ends = {"end_id": tokenizer.eos_token_id, "stop_ids": frozenset(marks), "turn_end_ids": frozenset(marks)}
        return Encoder(
            tokenizer=tokenizer, tokenizer_name="toy", template=template, **{"max_length": 999, **ends, **settings}
        )

    return _build


def sample(messages, **fields):
    return sample_from(Record("a.jsonl", 1, "line", {"messages": messages, **fields}))


def said(encoder, messages, **fields):
    """What is learnt, for each piece."""
    pieces = encoder.encode(sample(messages, **fields)).pieces
    labels = [[id_ if flag else -100 for id_, flag in zip(one.ids, one.trained, strict=True)] for one in pieces]
    return [learnt(encoder.tokenizer, one.ids, those) for one, those in zip(pieces, labels, strict=True)]


def texts(encoder, messages, **fields):
    return [encoder.tokenizer.decode(one.ids) for one in encoder.encode(sample(messages, **fields)).pieces]


EMPTY = "<think>\n\n</think>\n\n"
JSON_CALL = '<tool_call>{"name": "look", "arguments": {"city": "Rome"}}</tool_call><|im_end|>'
DEEP_CALL = '<tool_call>look\n```json\n{"city": "Rome"}\n```<|im_end|>'
FINAL = "<|channel|>final<|message|>"
TABLE = {
    "qwen3": {
        "one": [[f"{EMPTY}4<|im_end|>"]],
        "system": [[f"{EMPTY}4<|im_end|>"]],
        "two": [[f"{EMPTY}4<|im_end|>"], [f"{EMPTY}6<|im_end|>"]],
        "second": [[f"{EMPTY}6<|im_end|>"]],
        "reasoning": [["<think>\nadd\n</think>\n\n4<|im_end|>"]],
        "tool": [[EMPTY + JSON_CALL], [f"{EMPTY}Sun.<|im_end|>"]],
    },
    "qwen35": {
        "one": [["\n</think>\n\n4<|im_end|>"]],
        "system": [["\n</think>\n\n4<|im_end|>"]],
        "two": [["\n</think>\n\n4<|im_end|>"], ["\n</think>\n\n6<|im_end|>"]],
        "second": [["\n</think>\n\n6<|im_end|>"]],
        "reasoning": [["add\n</think>\n\n4<|im_end|>"]],
        "tool": [["\n</think>\n\n" + JSON_CALL], ["\n</think>\n\nSun.<|im_end|>"]],
    },
    "phi35": {
        "one": [["4<|end|>"]],
        "system": [["4<|end|>"]],
        "two": [["4<|end|>", "6<|end|>"]],
        "second": [["6<|end|>"]],
        "reasoning": [["<think>\nadd\n</think>\n\n4<|end|>"]],
        "tool": "the tool call 'look'",
    },
    "gpt_oss": {
        "one": [[f"{FINAL}4<|return|>"]],
        "system": [[f"{FINAL}4<|return|>"]],
        "two": [[f"{FINAL}4<|return|>"], [f"{FINAL}6<|return|>"]],
        "second": [[f"{FINAL}6<|return|>"]],
        "reasoning": [[f"{FINAL}<think>\nadd\n</think>\n\n4<|return|>"]],
        "tool": [[' to=look<|channel|>commentary<|message|>{"city": "Rome"}<|call|>', f"{FINAL}Sun.<|return|>"]],
    },
    "deepseek_v3": {
        "one": [["4<|im_end|>"]],
        "system": [["4<|im_end|>"]],
        "two": [["4<|im_end|>", "6<|im_end|>"]],
        "second": [["6<|im_end|>"]],
        "reasoning": [["<think>\nadd\n</think>\n\n4<|im_end|>"]],
        "tool": [[DEEP_CALL, "Sun.<|im_end|>"]],
    },
    "r1_distill": {
        "one": [["4<|im_end|>"]],
        "system": [["4<|im_end|>"]],
        "two": [["4<|im_end|>", "6<|im_end|>"]],
        "second": [["6<|im_end|>"]],
        "reasoning": "the thoughts",
        "tool": [[DEEP_CALL, "Sun.<|im_end|>"]],
    },
    "nemotron": {
        "one": [["4<|eot_id|>"]],
        "system": [["4<|eot_id|>"]],
        "two": [["4<|eot_id|>", "6<|eot_id|>"]],
        "second": [["6<|eot_id|>"]],
        "reasoning": "the thoughts",
        "tool": [['<TOOLCALL>look{"city": "Rome"}</TOOLCALL><|eot_id|>', "Sun.<|eot_id|>"]],
    },
}
TEMPLATES = {name: getattr(families, name.upper()) for name in TABLE}
# The end of an answer under each named template, and what it begins with.
NAMED_ENDS = {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "zephyr": "</s>",
}
for _name in TEMPLATE_NAMES:
    _lead, _end = " " if _name in ("dialogue", "mistral") else "", NAMED_ENDS.get(_name, "<eos>")
    TEMPLATES[_name] = chat_template(_name)
    TABLE[_name] = {
        "one": [[f"{_lead}4{_end}"]],
        "system": [[f"{_lead}4{_end}"]],
        "two": [[f"{_lead}4{_end}", f"{_lead}6{_end}"]],
        "second": [[f"{_lead}6{_end}"]],
        "reasoning": [[f"{_lead}<think>\nadd\n</think>\n\n4{_end}"]],
        "tool": "refuses this conversation: it takes the roles system, user and assistant",
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", TABLE)
def test_what_is_learnt(encoder, family, shape):
    expected, one = TABLE[family][shape], encoder(TEMPLATES[family])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if isinstance(expected, str):
            with pytest.raises(DataError, match=expected):
                said(one, SHAPES[shape])
            return
        assert said(one, SHAPES[shape]) == expected
    assert all("begins answers in another way" in str(one.message) for one in told)
    assert len(told) == (family == "r1_distill")
    if shape == "system":
        assert "Be kind." in texts(one, SHAPES[shape])[0]


def test_an_answers_context_is_what_the_model_is_given(encoder):
    """What stands before the last answer is the generation prompt for it, where the template allows that."""
    for family in TABLE.keys() - {"r1_distill"}:
        one, messages = encoder(TEMPLATES[family]), SHAPES["two"]
        prompt = one._answers.renderer.write(sample(messages), 3, prompt=True).text
        assert texts(one, messages)[-1].startswith(prompt)
        assert not texts(one, messages)[0].startswith(prompt + "4")  # control


def test_thoughts_are_learnt_where_their_turn_is(encoder):
    thinking = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "4", "reasoning_content": "first"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "6", "reasoning": "second"},
    ]
    qwen = encoder(families.QWEN3)
    assert said(qwen, thinking) == [
        ["<think>\nfirst\n</think>\n\n4<|im_end|>"],
        ["<think>\nsecond\n</think>\n\n6<|im_end|>"],
    ]
    assert "first" not in texts(qwen, thinking)[1]
    harmony = said(encoder(families.GPT_OSS), thinking[:2])[0]
    assert harmony == [f"<|channel|>analysis<|message|>first<|end|><|start|>assistant{FINAL}4<|return|>"]
    for name in ("chatml", "gemma"):
        with pytest.raises(DataError, match=r"turn 2: the chat template .* the thoughts \(reasoning_content\)"):
            said(encoder(TEMPLATES[name]), thinking)
    # A thought of a turn that is not learnt may be dropped; it is counted.
    thinking[1]["train"] = 0
    encoded = qwen.encode(sample(thinking))
    assert len(encoded.pieces) == 1
    assert encoded.ignored == {"messages[].reasoning_content"}


def test_template_arguments(encoder):
    quiet = encoder(families.QWEN3, template_arguments={"enable_thinking": False})
    assert said(quiet, SHAPES["one"]) == [["4<|im_end|>"]]
    assert texts(quiet, SHAPES["one"])[0].endswith(f"{EMPTY}4<|im_end|>")
    assert said(encoder(families.QWEN3), SHAPES["one"]) != [["4<|im_end|>"]]  # control
    for name in ("enable_thinkng", "tools", "add_generation_prompt", "eos_token"):
        with pytest.raises(ValueError, match=f"template_arguments sets '{name}'"):
            encoder(families.QWEN3, template_arguments={name: False})


def test_train_on(encoder):
    last = encoder(families.QWEN3, train_on="last")
    assert said(last, SHAPES["two"]) == TABLE["qwen3"]["two"][1:]
    assert said(encoder(TEMPLATES["chatml"], train_on="last"), SHAPES["two"]) == [["6<|im_end|>"]]
    whole = said(encoder(families.QWEN3, train_on="all"), SHAPES["two"])
    assert len(whole) == 1
    assert whole[0][0].count("4<|im_end|>") == 1
    marked = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in SHAPES["one"]]
    assert encoder(TEMPLATES["chatml"]).encode(sample(marked)).num_lost == 1


def test_generation_markers_in_several_blocks(encoder):
    block = "{% generation %}{{ m.content }}{% endgeneration %}%s{% generation %}<|im_end|>{% endgeneration %}"
    rest = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}BLOCK{% else %}{{ m.content }}"
    )
    rest += "<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for between, expected in (("", ["4<|im_end|>", "6<|im_end|>"]), ("--", ["4", "<|im_end|>", "6", "<|im_end|>"])):
        template = rest.replace("BLOCK", block.replace("%s", between))
        assert said(encoder(template), SHAPES["two"]) == [expected]
        assert said(encoder(template), SHAPES["second"]) == [expected[len(expected) // 2 :]]


def test_headers_are_never_learnt(encoder):
    opening = [{"role": "assistant", "content": "Hi."}, *turns("q", "4")]
    no_prompt = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    asks_first = "{{ messages[0].content[:0] }}" + no_prompt
    asks_first += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for template in (no_prompt, asks_first, families.NEMOTRON, families.DEEPSEEK_V3, TEMPLATES["chatml"]):
        answers = said(encoder(template), opening)[0]
        assert [answer.partition("<")[0] for answer in answers] == ["Hi.", "4"]


def test_words_before_a_tool_call(encoder):
    both = [*turns("q"), {"role": "assistant", "content": "Well.", "tool_calls": [CALL]}]
    assert said(encoder(families.QWEN3), both) == [[EMPTY + "Well." + JSON_CALL]]


def test_words_with_end_marks_are_learnt_whole(encoder):
    for template in (families.QWEN35, TEMPLATES["chatml"], TEMPLATES["dialogue"], families.DEEPSEEK_V3):
        answer = said(encoder(template), turns("q", "one<|im_end|>two"))[0]
        assert answer[0].partition("one")[1:][1].startswith("<|im_end|>two<")
        assert not answer[0].endswith("\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "q"}}]}, "the description of the tool 'q'"),
        ({"messages": [*turns("q"), {**turns("", "4")[1], "tool_calls": [CALL]}]}, "turn 2: .*the tool call 'look'"),
        # The name stands in the question, too.
        ({"messages": [*turns("look"), {**turns("", "4")[1], "tool_calls": [CALL]}]}, "the tool call 'look'"),
    ],
)
def test_what_a_template_leaves_out_is_refused(encoder, fields, message):
    record = Record("a.jsonl", 1, "line", {"messages": turns("q", "4"), **fields})
    with pytest.raises(DataError, match=rf"^a\.jsonl, line 1.*{message}.*Set template to one that writes it"):
        encoder(TEMPLATES["chatml"]).encode(sample_from(record))
    assert encoder(families.QWEN3).encode(sample_from(record)).pieces  # control


def test_content_that_a_template_leaves_out_is_refused(encoder):
    no_system = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    with pytest.raises(DataError, match=r"turn 1: .* leaves out or changes the content"):
        said(encoder(no_system), SHAPES["system"])
    assert said(encoder(no_system), SHAPES["one"])  # control
    second = dict(CALL, function={"name": "find", "arguments": {}})
    both = [*turns("q"), {"role": "assistant", "tool_calls": [CALL, second]}]
    with pytest.raises(DataError, match="the tool call 'find'"):
        said(encoder(families.GPT_OSS), both)
    named = [{**turn, "name": "ann"} for turn in SHAPES["one"]]
    assert encoder(TEMPLATES["chatml"]).encode(sample(named)).ignored == {"messages[].name"}


def test_small_things_that_a_template_leaves_out(encoder):
    names_only = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + TEMPLATES["chatml"]
    tools = [{"type": "function", "function": {"name": "look", "description": "Look it up."}}]
    with pytest.raises(DataError, match=r"leaves out or changes the description 'Look it up\.' of a tool"):
        said(encoder(names_only), SHAPES["one"], tools=tools)
    del tools[0]["function"]["description"]
    assert said(encoder(names_only), SHAPES["one"], tools=tools) == [["4<|im_end|>"]]  # control
    no_arguments = families.QWEN3.replace("'arguments': c.function.arguments", "'arguments': 0")
    call = {"name": "look", "arguments": {"n": 3}}
    for template, expected in ((no_arguments, "the argument '3' of a tool call"), (families.QWEN3, "")):
        asked = [*turns("q3"), {"role": "assistant", "tool_calls": [{**call, "id": "call12345"}]}]
        if expected:
            with pytest.raises(DataError, match=expected):
                said(encoder(template), asked)
        else:
            assert encoder(template).encode(sample(asked)).ignored == {"messages[].tool_calls[].id"}


def test_two_answers_in_a_row(encoder):
    """The generation prompt is not the beginning of the second one, as the first is framed anew."""
    both = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}]
    both.append({"role": "assistant", "content": "5"})
    opened = "\n</think>\n\n"
    for template, lead, end in ((families.GPT_OSS, FINAL, "<|return|>"), (families.QWEN35, opened, "<|im_end|>")):
        with pytest.warns(UserWarning, match="begins answers in another way"):
            answers = said(encoder(template), both)
        assert answers == [[f"{lead}4{end}"], [f"{lead}5{end}"]]


def test_half_a_character_is_learnt_as_a_question_mark(encoder):
    odd = [*turns("q\ud800"), {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"a": "\ud83d"}}]}]
    assert said(encoder(families.QWEN3), odd) == [[EMPTY + JSON_CALL.replace("city", "a").replace("Rome", "?")]]


def test_switches_and_json_are_no_loss(encoder):
    switch = "{% for m in messages %}{{ m.role }}: {{ m.content | replace('/no_think', '') | trim }}<eos>{% endfor %}"
    assert said(encoder(switch), turns("q /no_think", "4"))
    quoted = [*SHAPES["tool"][:2], {"role": "tool", "content": '"5 °C"\nand rain'}, SHAPES["tool"][3]]
    assert said(encoder(families.GPT_OSS), quoted) == TABLE["gpt_oss"]["tool"]


# Length.


def test_what_is_too_long(encoder):
    text = sample_from(Record("a.jsonl", 1, "line", {"text": "zqxwvkj" * 3}))
    whole = encoder(None).encode(text).pieces[0]
    assert len(whole.ids) == 22
    pieces = {way: encoder(None, max_length=8, too_long=way).encode(text) for way in ("cut", "split", "drop")}
    assert [one.ids for one in pieces["cut"].pieces] == [whole.ids[:8]]
    assert [one.ids for one in pieces["split"].pieces] == [whole.ids[:8], whole.ids[8:16], whole.ids[16:]]
    assert [len(one.pieces) for one in pieces.values()] == [1, 3, 0]
    assert [one.num_lost for one in pieces.values()] == [0, 0, 1]
    assert all(one.cut for one in pieces.values())
    assert not encoder(None, max_length=22, too_long="drop").encode(text).cut  # control


def test_pieces_without_answers_are_left_out(encoder):
    pair = sample_from(Record("a.jsonl", 1, "line", {"prompt": "zqxwvkj" * 2, "completion": "zq"}))
    encoded = encoder(None, max_length=7, too_long="split").encode(pair)
    assert len(encoded.pieces) == 1
    assert encoded.num_lost == 2
    assert encoder(None, max_length=7).encode(pair).num_lost == 1


def test_plain_texts_are_learnt_whole(encoder):
    text = sample_from(Record("a.jsonl", 1, "line", {"text": "one<|im_end|>two"}))
    one = encoder(TEMPLATES["chatml"]).encode(text).pieces[0]
    assert all(one.trained)
    assert encoder(None).tokenizer.decode(one.ids) == "one<|im_end|>two<eos>"
    pair = sample_from(Record("a.jsonl", 1, "line", {"prompt": "q<eos>", "completion": "one<|im_end|>two"}))
    one = encoder(None).encode(pair).pieces[0]
    assert encoder(None).tokenizer.decode([id_ for id_, flag in zip(one.ids, one.trained, strict=True) if flag]) == (
        "one<|im_end|>two<eos>"
    )
