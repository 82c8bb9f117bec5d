"""Chat templates of the kinds that there are, for tests of who says what in a prompt. Written for these tests."""

# ruff: noqa: E501 — templates are written as models publish them

from __future__ import annotations

TURNS = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif -%}
{{ '# Tools\\n<tools>' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif -%}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' and not message.content.startswith('<tool_response>') %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- set content = message.content or '' %}{% set reasoning = message.reasoning_content or '' %}
{%- if not reasoning and '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if loop.index0 > ns.last and reasoning %}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}{{ content }}
{%- for call in message.tool_calls or [] %}{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
"""Reasoning only behind the last words of a user, tools before all; a message that begins like a result is looked at."""

DATED = """\
{{- '<|start|>system\\n\\nToday is ' + (date_string or strftime_now('%d %b %Y')) + '\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ '<|end|>' }}
{%- for message in rest %}{{ '<|start|>' + message.role + '\\n\\n' + message.content | trim + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n\\n' }}{% endif %}"""
"""It says the date by itself, and knows no tools."""

LAST = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- if message.role == 'user' %}{% if loop.last and tools %}{{ '[TOOLS]' }}{{ tools | tojson }}{{ '[/TOOLS]' }}{% endif %}{{ '[INST]' }}{% if loop.last and system %}{{ system + '\\n\\n' }}{% endif %}{{ message.content + '[/INST]' }}
{%- elif message.role == 'assistant' and message.content %}{{ ' ' + message.content | trim + '</s>' }}{% endif %}
{%- endfor %}"""
"""The system prompt and tools stand before the last message, and calls and results are dropped."""
