"""Small chat templates that behave like those of the models in use; all written for these tests."""

_THOUGHTS = """
{%- macro thoughts(m) -%}
    {%- if m.reasoning_content is string -%}{{- m.reasoning_content -}}
    {%- elif '</think>' in m.content -%}{{- m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro words(m) -%}{{- m.content.split('</think>')[-1].lstrip('\\n') -}}{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
"""
_CALLS = """
{%- macro calls(m) -%}
    {%- for c in m.tool_calls or [] -%}
        {{- '<tool_call>' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson) + '</tool_call>' -}}
    {%- endfor -%}
{%- endmacro -%}
"""
_IM_TURNS = """
{%- if tools -%}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
    {%- if m.role == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' -}}
    {%- elif m.role != 'assistant' -%}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > ns.last and (loop.last or thoughts(m)) -%}
            {{- '<think>\\n' + thoughts(m) + '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- words(m) + calls(m) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
"""
# Drops earlier thoughts, and frames the last answer.
QWEN3 = (
    _THOUGHTS
    + _CALLS
    + _IM_TURNS
    + """
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
)
# As Qwen3, and its generation prompt opens the block of thoughts.
QWEN35 = (
    _THOUGHTS
    + _CALLS
    + _IM_TURNS
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
# Writes its end token once, in place of a generation prompt.
PHI35 = """
{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""
# Has another end mark for the last answer, and drops earlier thoughts.
GPT_OSS = """
{%- if tools -%}{{- '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' -}}{%- endif -%}
{%- for m in messages -%}
    {%- if m.role == 'tool' -%}
        {{- '<|start|>functions<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' -}}
    {%- elif m.role != 'assistant' -%}
        {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}
    {%- else -%}
        {%- if m.thinking and (loop.last or m.tool_calls) -%}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}
        {%- endif -%}
        {%- if m.tool_calls -%}
            {%- set f = m.tool_calls[0].function -%}
            {{- '<|start|>assistant to=' + f.name + '<|channel|>commentary<|message|>' -}}
            {{- (f.arguments | tojson) + '<|call|>' -}}
        {%- else -%}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}
            {{- '<|return|>' if loop.last else '<|end|>' -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""
_DEEPSEEK = """
{%- set ns = namespace(system='') -%}
{%- for m in messages if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- endfor -%}
{{- '<bos>' + ns.system -}}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}{{- '<User>' + m.content -}}
    {%- elif m.role == 'tool' -%}{{- '<tool_output>' + m.content + '<end_output>' -}}
    {%- elif m.role == 'assistant' and m.content is none -%}
        {%- for c in m.tool_calls -%}
            {{- '<Assistant><tool_call>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```' -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
    {%- elif m.role == 'assistant' -%}{{- '<Assistant>' + ANSWER + '<|im_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'PROMPT' -}}{%- endif -%}"""
# Wants None for the content beside tool calls, and their arguments as a text.
DEEPSEEK_V3 = _DEEPSEEK.replace("ANSWER", "m.content").replace("PROMPT", "<Assistant>")
# Drops every thought, and opens a block of them in its generation prompt.
R1_DISTILL = _DEEPSEEK.replace("ANSWER", "m.content.split('</think>')[-1]").replace("PROMPT", "<Assistant><think>\\n")
# Drops the thoughts of every turn, whatever the system says of thinking.
NEMOTRON = """
{%- for m in messages -%}
    {%- set words = m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' else m.content -%}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (words | trim) -}}
    {%- for c in m.tool_calls or [] -%}
        {{- '<TOOLCALL>' + c.function.name + (c.function.arguments | tojson) + '</TOOLCALL>' -}}
    {%- endfor -%}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
