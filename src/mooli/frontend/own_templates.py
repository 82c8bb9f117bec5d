"""Chat templates of families whose folders have none, as their messages are built by code of their own.

Owns the templates. That code is never run. Source: the model cards of openPangu-Embedded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PANGU = """{%- macro turn(role, text) -%}
{{ '[unused9]' ~ role ~ '：' ~ text ~ '[unused10]' }}
{%- endmacro -%}
{%- set roles = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具', 'function': '方法'} -%}
{{- bos_token -}}
{%- if not messages or messages[0]['role'] != 'system' -%}{{- turn('系统', '') -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in roles -%}
{{- raise_exception('openPangu knows no role ' ~ message['role']) -}}
{%- endif -%}
{%- set is_fast = enable_thinking is defined and not enable_thinking and loop.last and message['role'] == 'user' -%}
{{- turn(roles[message['role']], (message['content'] or '') ~ (' /no_think' if is_fast else '')) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[unused9]助手：' -}}{%- endif -%}
"""

_TEMPLATES = {"PanguEmbedded": _PANGU, "pangu-embedded": _PANGU}
"""By `model_type` of a config.json and by `general.architecture` of a GGUF file."""


def own_template(described: Mapping[str, Any]) -> str | None:
    """The template of the family that a config.json or GGUF metadata names; None for most."""
    name = described.get("model_type") or described.get("general.architecture")
    return _TEMPLATES.get(name) if isinstance(name, str) else None
