"""Answers that a template writes otherwise than its generation prompt announces, or otherwise once a turn follows."""

import pytest

from lora_lightning.errors import DataError
from tests.data.language import families
from tests.data.language.reading import CALL, said, texts
from tests.data.talk import turns

USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "Be kind."}
# As Qwen3.5 for answers without thoughts: its generation prompt closes the block at once.
CLOSED = families.QWEN35.replace(
    "assistant\\n<think>\\n' -}}{%- endif -%}", "assistant\\n<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
)
# As gpt-oss: words beside a tool call are thoughts, and are dropped once a last answer follows.
WITH_WORDS = families.GPT_OSS.replace(
    "{%- if m.thinking and (loop.last or m.tool_calls) -%}",
    """{%- if m.tool_calls and m.content and messages[-1].tool_calls -%}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' -}}
        {%- endif -%}
        {%- if m.thinking and (loop.last or m.tool_calls) -%}""",
)
# As GLM: what ends a turn is the role of the next one.
NO_END = """{%- for m in messages -%}{{- '<|' + {'user': 'eot_id', 'assistant': 'end'}[m.role] + '|>' + m.content -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|end|>' -}}{%- endif -%}"""
# As Mistral's: the system's words stand before the last turn only, if the user's.
LATE_SYSTEM = """{%- set talk = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for m in talk -%}
    {%- if m.role == 'user' -%}
        {{- '[INST] ' + (messages[0].content + ' ' if loop.last and messages[0].role == 'system' else '') -}}
        {{- m.content + '[/INST]' -}}
    {%- else -%}{{- ' ' + m.content + '<eos>' -}}{%- endif -%}
{%- endfor -%}"""


def test_an_answer_right_after_a_tool_call(encoder):
    """The first one has no words, and is framed anew when the second follows."""
    both = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "assistant", "content": "5"}]
    with pytest.warns(UserWarning, match="begins answers in another way"):
        first, second = said(encoder(families.QWEN35), both)
    assert first == ['\n</think>\n\n<tool_call>{"name": "look", "arguments": {"city": "Rome"}}</tool_call><|im_end|>']
    assert second == ["\n</think>\n\n5<|im_end|>"]


def test_thoughts_under_a_prompt_that_forbids_them(encoder):
    thinking = [USER, {"role": "assistant", "content": "4", "reasoning_content": "add"}]
    closing = encoder(families.QWEN3, template_arguments={"enable_thinking": False})
    for one in (encoder(CLOSED), closing):
        with pytest.warns(UserWarning, match="begins answers in another way"):
            assert said(one, thinking) == [["<think>\nadd\n</think>\n\n4<|im_end|>"]]
        assert texts(one, thinking)[0].split("q<|im_end|>\n")[1].startswith("<|im_start|>assistant\n<think>")
        assert said(one, turns("q", "4")) == [["4<|im_end|>"]]  # control
        two = [*turns("q", "4"), *turns("r"), {**thinking[1], "content": "6"}]
        assert said(one, two) == [["4<|im_end|>"], ["<think>\nadd\n</think>\n\n6<|im_end|>"]]


def test_words_beside_a_tool_call_that_are_dropped_later(encoder):
    call = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
    talk = [USER, call, {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Sun."}]
    one = encoder(WITH_WORDS)
    first, second = said(one, talk)
    begin = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant to=look"
    assert first == [begin + '<|channel|>commentary<|message|>{"city": "Rome"}<|call|>']
    assert second == ["<|channel|>final<|message|>Sun.<|return|>"]
    assert "Let me see." not in texts(one, talk)[1]
    with pytest.raises(DataError, match=r"turn 2: .* leaves out or changes the content"):  # control: never written
        said(encoder(families.GPT_OSS), talk)


def test_the_mark_of_the_next_turn_ends_an_answer(encoder):
    assert said(encoder(NO_END), turns("q", "4", "r", "6")) == [["4<|eot_id|>", "6<eos>"]]
    ended = NO_END.replace("+ m.content", "+ m.content + ('<|im_end|>' if m.role == 'assistant' else '')")
    assert said(encoder(ended), turns("q", "4", "r", "6")) == [["4<|im_end|>", "6<|im_end|>"]]  # control


def test_every_word_is_learnt_up_to_the_last_end_mark(encoder):
    every = {"train_on": "all"}
    for mark in ("<|im_end|>\\n", "<|im_end|>"):
        template = "{% for m in messages %}" + "{{ m.role + '\\n' + m.content + 'MARK' }}{% endfor %}".replace(
            "MARK", mark
        )
        between = mark.replace("\\n", "\n")
        assert said(encoder(template, **every), turns("q", "4")) == [[f"user\nq{between}assistant\n4<|im_end|>"]]
    plain = encoder("{% for m in messages %}{{ m.role + '\\n' + m.content + '\\n' }}{% endfor %}", **every)
    assert said(plain, turns("q", "4")) == [["user\nq\nassistant\n4\n<eos>"]]  # control: no mark


def test_what_hides_an_answer_is_named(encoder):
    one = encoder(LATE_SYSTEM)
    with pytest.raises(DataError, match=r"turn 1: .* leaves out or changes the content"):
        said(one, [SYSTEM, *turns("q", "4")])
    assert said(one, turns("q", "4")) == [[" 4<eos>"]]  # control
