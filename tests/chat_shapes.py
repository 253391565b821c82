"""Chat templates of the public shapes, written anew, and small tokenizers with their tokens."""

import json
from dataclasses import dataclass, field
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from preprocess.text.tokens import EMBEDDED_PATH

WORDS = [
    "What is it? A red ball. And that: 3 cats, naïve ones! Be brief. Answer in one word.",
    "[INST] User: USER: Assistant: ASSISTANT: ### Human: system user assistant model",
    "You are a helpful assistant. Today Date: 26 Jul 2024 a b c d e f g h i j k l m n o p q r s t",
]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A template and the tokens that its family adds."""

    template: str
    tokens: tuple = ()
    """Special tokens."""
    words: tuple = ()
    """Added tokens that are not called special."""
    strips: tuple = ()
    """Tokens that swallow the space after them."""
    bos: str | None = None
    eos: str = "</s>"
    base: str = "bytes"
    """"bytes": byte-level BPE; "first", "always", "never": SentencePiece, by where it puts spaces;
    "legacy": the normalizer of Llama 2."""
    writes_bos: bool = False
    system: bool = True
    date: str = ""
    changed: tuple = field(default=())
    """Literals that change a text."""


PLAIN_LOOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DEFINITIONS = (
    '{{- "# Tools\\n\\nYou may call functions, given within <tools></tools>:\\n<tools>" }}'
    "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{{- '\\n</tools>\\n\\n"
    "Return calls within <tool_call></tool_call>.<|im_end|>\\n' }}"
)
_CALLS = (
    "{%- for tool_call in message.tool_calls %}{%- if (loop.first and message.content) or"
    " not loop.first %}{{- '\\n' }}{%- endif %}{%- if tool_call.function %}"
    "{%- set tool_call = tool_call.function %}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + tool_call.name + \'", "arguments": \' }}'
    "{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
)
_RESULT = (
    "{%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}{{- '<|im_start|>user' }}"
    "{%- endif %}RESULT{{- '\\n</tool_response>' }}"
    "{%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
)
_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
TEXT_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}"
    "{{- messages[0].content }}{%- else %}{{- 'You are Q.' }}{%- endif %}{{- '\\n\\n' }}"
    + _DEFINITIONS
    + "{%- endif %}{%- for message in messages %}{%- if message.role == 'user' or"
    " (message.role == 'system' and not (loop.first and tools)) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + message.content }}"
    + _CALLS
    + "{{- '<|im_end|>\\n' }}{%- elif message.role == 'tool' %}"
    + _RESULT.replace("RESULT", "{{- '\\n<tool_response>\\n' + message.content }}")
    + "{%- endif %}{%- endfor %}"
    + _PROMPT
)
"""Qwen2.5's shape, with tools."""

_PARTS = (
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
)
QWEN3_VL = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}"
    "{%- set message = messages[0] %}"
    + _PARTS
    + "{{- '\\n\\n' }}{%- endif %}"
    + _DEFINITIONS
    + "{%- elif messages[0].role == 'system' %}{%- set message = messages[0] %}"
    "{{- '<|im_start|>system\\n' }}" + _PARTS + "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}" + _PARTS + _CALLS + "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}"
    + _RESULT.replace("RESULT", "{{- '\\n<tool_response>\\n' }}" + _PARTS)
    + "{%- endif %}{%- endfor %}"
    + _PROMPT
)
"""Qwen3-VL's shape."""

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

SHAPES = {
    "chatml": Shape(template=PLAIN_LOOP, tokens=CHATML, eos="<|im_end|>"),
    "qwen2": Shape(
        template="{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        + PLAIN_LOOP.split("%}", 1)[1],
        tokens=CHATML,
        eos="<|im_end|>",
    ),
    "qwen2.5": Shape(
        template="{%- if tools %}\n{{- 'tools' }}\n{%- else %}\n"
        "    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "    {%- else %}\n        {{- '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}\n"
        "    {%- endif %}\n{%- endif %}\n{%- for message in messages %}\n"
        '    {%- if (message.role == "user") or (message.role == "system" and not loop.first)'
        ' or (message.role == "assistant" and not message.tool_calls) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n'"
        " }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        tokens=CHATML,
        words=("<tool_call>", "</tool_call>"),
        eos="<|im_end|>",
    ),
    "qwen2.5-tools": Shape(
        template=TEXT_TOOLS,
        tokens=CHATML,
        words=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        eos="<|im_end|>",
    ),
    "qwen3-vl": Shape(
        template=QWEN3_VL,
        tokens=(*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        words=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        eos="<|im_end|>",
    ),
    # The last answer gets an empty thought, and earlier ones lose theirs.
    "qwen3": Shape(
        template="{%- if messages[0].role == 'system' %}"
        "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
        "{%- set ns = namespace(last=messages|length - 1) %}"
        "{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not loop.first)"
        " %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{%- elif m.role == 'assistant' %}{%- set content = m.content %}{%- set thought = '' %}"
        "{%- if '</think>' in content %}"
        "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{%- if loop.last %}{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n')"
        " + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
        "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
        "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        tokens=CHATML,
        words=("<think>", "</think>", "<tool_call>"),
        eos="<|im_end|>",
    ),
    # The tokenizer calls the opening marker its BOS.
    "smollm": Shape(
        template="{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system'"
        " %}{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        tokens=CHATML,
        bos="<|im_start|>",
        eos="<|im_end|>",
    ),
    "internlm2": Shape(
        template="{{ bos_token }}" + PLAIN_LOOP,
        tokens=("<s>", "</s>"),
        words=("<|im_start|>", "<|im_end|>", "<|plugin|>"),
        bos="<s>",
        writes_bos=True,
        base="legacy",
    ),
    "llama2": Shape(
        template="{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n'"
        " + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        tokens=("<s>", "</s>", "<unk>"),
        bos="<s>",
        base="legacy",
        writes_bos=True,
    ),
    "llama3": Shape(
        template="{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        tokens=(*HEADERS, "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        writes_bos=True,
    ),
    "llama3.2": Shape(
        template="{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
        '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n"
        '    {%- set system_message = "" %}\n{%- endif %}\n'
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n{{- system_message }}\n'
        '{{- "<|eot_id|>" }}\n{%- for message in messages %}\n'
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
        tokens=HEADERS,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        writes_bos=True,
        date="2024-02-29",
    ),
    "gemma": Shape(
        template="{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        tokens=("<bos>", "<eos>"),
        words=("<start_of_turn>", "<end_of_turn>", "<table>", "\n\n"),
        bos="<bos>",
        eos="<eos>",
        base="never",
        writes_bos=True,
        system=False,
    ),
    # A system text becomes the beginning of the first user text.
    "gemma3": Shape(
        template="{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n"
        "    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}\n"
        "    {%- set loop_messages = messages[1:] -%}\n{%- else -%}\n"
        '    {%- set first_user_prefix = "" -%}\n    {%- set loop_messages = messages -%}\n'
        "{%- endif -%}\n{%- for message in loop_messages -%}\n"
        "    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}\n"
        "    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}\n"
        "    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n"
        "    {%- endif -%}\n    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n    {{'<start_of_turn>model\n'}}\n{%- endif -%}\n",
        tokens=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        base="never",
        writes_bos=True,
    ),
    "mistral": Shape(
        template="{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
        tokens=("<s>", "</s>", "<unk>"),
        bos="<s>",
        base="first",
        writes_bos=True,
        system=False,
    ),
    # The system text is in the last user text, whichever that is.
    "mistral-v3": Shape(
        template="{%- if messages[0]['role'] == 'system' %}"
        "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
        "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
        "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
        "{%- if loop.index0 >= loop_messages|length - 2 and system_message is defined %}"
        "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
        "{%- else %}{{- ' ' + message['content']|trim + eos_token }}{%- endif %}{%- endfor %}",
        tokens=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        base="always",
        writes_bos=True,
    ),
    # Tokens that swallow the space after them, and one more token at the end of all.
    "phi3": Shape(
        template="{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        tokens=("<s>", "<|endoftext|>", "<|end|>"),
        words=("<|system|>", "<|user|>", "<|assistant|>"),
        strips=("<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        bos="<s>",
        eos="<|endoftext|>",
        base="legacy",
    ),
    "phi4": Shape(
        template="{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>'"
        " + message['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        tokens=("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
    ),
    "zephyr": Shape(
        template="{% for message in messages %}\n"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
        tokens=("<s>", "</s>", "<unk>"),
        bos="<s>",
        base="legacy",
    ),
    "vicuna": Shape(
        template="{% if messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'].strip() + ' ' }}{% set messages = messages[1:] %}"
        "{% else %}{{ 'A chat between a and b. ' }}{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ 'USER: ' + message['content'].strip() + ' ' }}{% else %}"
        "{{ 'ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        tokens=("<s>", "</s>", "<unk>"),
        bos="<s>",
        base="legacy",
    ),
    # The generation prompt opens a thought that the history does not have.
    "deepseek": Shape(
        template="{% set ns = namespace(system='') %}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] %}"
        "{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
        "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}",
        tokens=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        words=("<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<｜fim▁hole｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        writes_bos=True,
        changed=("</think>",),
    ),
    "command-r": Shape(
        template="{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% if system_message != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>'"
        " + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% for message in loop_messages %}{% set content = message['content'] %}"
        "{% if message['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>'"
        " + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip()"
        " + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        tokens=("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        words=("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        writes_bos=True,
    ),
    "falcon": Shape(
        template="{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
        "{{ message['role'] | capitalize + ': ' + message['content'] | trim }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}",
        tokens=("<|endoftext|>",),
        eos="<|endoftext|>",
    ),
    "olmo": Shape(
        template="{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '\n' }}{% else %}{{ '<|assistant|>\n'"
        " + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% endif %}{% endfor %}",
        tokens=("<|endoftext|>", "<|bos|>"),
        bos="<|bos|>",
        eos="<|endoftext|>",
        writes_bos=True,
    ),
    # One token begins a text and ends an answer.
    "olmo2": Shape(
        template="{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '\n' }}{% else %}{{ '<|assistant|>\n'"
        " + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% endif %}{% endfor %}",
        tokens=("<|endoftext|>",),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        writes_bos=True,
    ),
    # A default system text with the date in it.
    "mistral-small": Shape(
        template="{%- set today = strftime_now('%Y-%m-%d') %}\n"
        "{%- set default_system_message = 'You are M.\nThe current date is ' + today + '.' %}\n\n"
        "{{- bos_token }}\n\n{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set loop_messages = messages[1:] %}\n{%- else %}\n"
        "    {%- set system_message = default_system_message %}\n"
        "    {%- set loop_messages = messages %}\n{%- endif %}\n"
        "{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}\n\n"
        "{%- for message in loop_messages %}\n    {%- if message['role'] == 'user' %}\n"
        "        {{- '[INST]' + message['content'] + '[/INST]' }}\n    {%- else %}\n"
        "        {{- message['content'] + eos_token }}\n    {%- endif %}\n{%- endfor %}\n",
        tokens=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        bos="<s>",
        writes_bos=True,
        date="2025-12-31",
    ),
    "openchat": Shape(
        template="{{ bos_token }}{% for message in messages %}"
        "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content']"
        " + '<|end_of_turn|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
        tokens=("<s>", "</s>"),
        words=("<|end_of_turn|>",),
        bos="<s>",
        eos="<|end_of_turn|>",
        base="legacy",
        writes_bos=True,
    ),
    "granite": Shape(
        template="{%- if messages[0]['role'] != 'system' %}"
        "{{- '<|start_of_role|>system<|end_of_role|>You are G.<|end_of_text|>\n' }}{%- endif %}"
        "{%- for message in messages %}{{- '<|start_of_role|>' + message['role']"
        " + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}"
        "{%- endif %}",
        tokens=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
    ),
    # One kind of space alone, and one side.
    "lines": Shape(
        template="{% for m in messages %}{{ m.role + ': ' + m.content.strip('\n').rstrip()"
        " + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}"
        "{% endif %}",
        tokens=("<|endoftext|>",),
        eos="<|endoftext|>",
    ),
    # Space is left around the last text alone.
    "history": Shape(
        template="{% for m in messages %}{{ '<|' + m.role + '|>'"
        " + (m.content if loop.last else m.content | trim) + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        tokens=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
    ),
}

# Templates whose ids cannot be made turn by turn, and a word of what the refusal says.
REFUSED = {
    "no token ends an answer": (
        "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n' }}{% endfor %}",
        "ends every answer",
    ),
    "a prompt in the style of Alpaca": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content }}"
        "{% else %}{{ '\n\n### Response:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}",
        "ends every answer",
    ),
    "GLM, where the next user ends an answer": (
        "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% endfor %}",
        "ends every answer",
    ),
    "gpt-oss, where the last answer has its own end": (
        "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
        "{{ eos_token if loop.last else '<|end|>' }}{% endfor %}",
        "ends every answer",
    ),
    "an end only after the last answer": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ eos_token }}",
        "ends every answer",
    ),
    "turns are numbered": (
        "{% for m in messages %}{{ 'Turn ' ~ loop.index ~ ': ' + m.content + eos_token }}"
        "{% endfor %}",
        "another number",
    ),
    "texts twice": (
        "{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}",
        "twice",
    ),
    "texts left out": ("{{ messages[0].content + eos_token }}", "leaves out"),
    "one exchange only": (
        "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
        "refuses a conversation",
    ),
    "malformed": ("{% for x", "refuses a conversation"),
    "capital letters": (
        "{% for m in messages %}{{ m.content | upper + eos_token }}{% endfor %}",
        "changes texts",
    ),
    "small letters": (
        "{% for m in messages %}{{ m.content | lower + eos_token }}{% endfor %}",
        "changes texts",
    ),
    "long texts are cut": (
        "{% for m in messages %}{{ m.content[:4000] + eos_token }}{% endfor %}",
        "changes texts",
    ),
    "long texts are marked": (
        "{% for m in messages %}{{ ('LONG ' if m.content | length > 500 else '') + m.content"
        " + eos_token }}{% endfor %}",
        "changes texts",
    ),
    "numbers are read": (
        "{% for m in messages %}{{ (m.content | int if m.content.isdigit() else m.content) | string"
        " + eos_token }}{% endfor %}",
        "changes texts",
    ),
    "links": (
        "{% for m in messages %}{{ m.content | replace('http' ~ '://', '') + eos_token }}"
        "{% endfor %}",
        "changes texts",
    ),
    "only the last ten messages": (
        "{% for m in messages[-10:] %}{{ m.content + eos_token }}{% endfor %}",
        "other markup",
    ),
    "long conversations are marked": (
        "{{ 'long' if messages | length > 20 }}{% for m in messages %}{{ m.content + eos_token }}"
        "{% endfor %}",
        "other markup",
    ),
    "lines are joined": (
        "{% for m in messages %}{{ m.content | replace('\n', ' ') + eos_token }}{% endfor %}",
        "changes texts",
    ),
    "escapes": (
        "{% for m in messages %}{{ m.content | tojson + eos_token }}{% endfor %}",
        "changes texts",
    ),
}


@cache
def sentencepiece(base):
    """A small BPE that spells spaces as SentencePiece does, as JSON."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # words do not grow together
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=["▁", *(chr(i) for i in range(33, 127))],
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    if base == "legacy":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=base, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = []
    return json.dumps(document)


def make_tokenizer(folder, shape):
    """Writes a tokenizer of a shape as a folder that transformers can load."""
    folder.mkdir()
    if shape.base == "bytes":
        text = (EMBEDDED_PATH / "tokenizer.json").read_text()
        document = json.loads(text)
        document["added_tokens"] = []
        text = json.dumps(document)
    else:
        text = sentencepiece(shape.base)
    tokenizer = Tokenizer.from_str(text)
    for token in (*shape.tokens, *shape.words):
        special = token in shape.tokens
        added = AddedToken(token, special=special, normalized=False, rstrip=token in shape.strips)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": shape.template,
        "eos_token": shape.eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    if shape.bos is not None:
        settings["bos_token"] = shape.bos
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)
