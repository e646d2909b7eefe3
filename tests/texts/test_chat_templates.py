import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lora_lightning.errors import ConfigError
from lora_lightning.texts.chat_templates import TEMPLATE_NAMES, chat_template, marks_answers
from tests.data.talk import turns

TALK = turns("Hi", "Hello", "A?", "B", system="Be kind.")
EXPECTED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    "gemma": "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nA?<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nA?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</E>\n\n### Instruction:\nA?\n\n### Response:\n"
    "B</E>\n\n",
    "mistral": "[INST] Be kind.\n\nHi [/INST] Hello</E>[INST] A? [/INST] B</E>",
    "phi3": "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nA?<|end|>\n"
    "<|assistant|>\nB<|end|>\n",
    "zephyr": "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nA?</s>\n"
    "<|assistant|>\nB</s>\n",
    "plain": "Be kind.\nHi\nHello</E>\nA?\nB</E>\n",
    "dialogue": "Be kind.\nUser: Hi\nAssistant: Hello</E>\nUser: A?\nAssistant: B</E>\n",
}


def render(name, messages, *, bos=False, prompt=False):
    texts, spans = render_jinja_template(
        [messages],
        chat_template=chat_template(name, bos=bos),
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        bos_token="<B>",
        eos_token="</E>",
    )
    return texts[0], [texts[0][start:end] for start, end in spans[0]]


PROMPTS = {
    "alpaca": "### Response:\n",
    "chatml": "<|im_start|>assistant\n",
    "dialogue": "Assistant:",
    "gemma": "<start_of_turn>model\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "",
    "phi3": "<|assistant|>\n",
    "plain": "",
    "zephyr": "<|assistant|>\n",
}
TRIMMED = ("gemma", "llama3", "mistral")


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_public_formats_are_written_as_published(name):
    assert render(name, TALK)[0] == EXPECTED[name]
    assert render(name, TALK, prompt=True)[0] == EXPECTED[name] + PROMPTS[name]
    blank = [{**turn, "content": f" {turn['content']}\n"} for turn in TALK]
    assert (render(name, blank)[0] == EXPECTED[name]) == (name in TRIMMED)


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_answers_are_marked_with_their_end_and_prompts_lead_to_them(name):
    text, answers = render(name, TALK)
    assert [answer.replace("</E>", "").split("<")[0].strip() for answer in answers] == ["Hello", "B"]
    assert all(answer.rstrip() != answer.replace("</E>", "").split("<")[0] for answer in answers)  # each has its end
    assert marks_answers(chat_template(name))
    prompt, _ = render(name, TALK[:4], prompt=True)
    assert text.startswith(prompt)
    assert text[len(prompt) :].startswith(answers[1])
    assert render(name, TALK, bos=True)[0] == "<B>" + text


def test_alpaca_tells_the_input_apart():
    asked = {"role": "user", "content": "Add.\n\n1, 1", "instruction": "Add.", "input": "1, 1"}
    text, answers = render("alpaca", [asked, {"role": "assistant", "content": "2"}])
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 1\n\n### Response:\n2</E>\n\n")
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert answers == ["2</E>"]
    plain, _ = render("alpaca", turns("Add 1, 1.", "2"))
    assert "### Input" not in plain
    assert "paired" not in plain


def test_templates_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"template 'chatlm' is unknown; .* Did you mean 'chatml'"):
        chat_template("chatlm")
    with pytest.raises(ConfigError, match="does not exist"):
        chat_template(str(tmp_path / "mine.jinja"))
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert chat_template(str(tmp_path / "mine.jinja")) == "{{ messages }}"
