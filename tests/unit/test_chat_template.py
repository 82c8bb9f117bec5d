"""Chat templates: the text of `apply_chat_template`, and a sandbox that holds."""

# ruff: noqa: E501 — templates are written as models publish them

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mooli.errors import ChatTemplateError
from mooli.frontend import template_sandbox
from mooli.frontend.chat_template import ChatTemplate

LLAMA3_LIKE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- system_message }}<|eot_id|>
{%- for message in messages %}
    {%- if message.role == 'tool' or 'tool_calls' in message %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + (message.tool_calls | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- for t in tools or [] %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

QWEN3_LIKE = """{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<t>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {%- generation %}{{- content }}{%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

MISTRAL_LIKE = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]{% else %}
 {{ message['content'] }}{{ eos_token }}{% endif %}
{% if loop.index > 50 %}{% break %}{% endif %}
{% endfor %}"""

TEMPLATES = {"llama 3": LLAMA3_LIKE, "qwen 3": QWEN3_LIKE, "mistral": MISTRAL_LIKE}

CHATS = {
    "one question": [{"role": "user", "content": "  Hi <b>&\"'</b> 你好 \n"}],
    "several turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb", "tool_calls": None},
        {"role": "user", "content": "<|im_end|> c"},
    ],
    "reasoning apart": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "because"},
        {"role": "user", "content": "c"},
    ],
    "answer with reasoning": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "thinking": "because"},
    ],
    "open answer": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is "}],
}

TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <x>", "parameters": {"b": 1, "a": [True]}}}]


def published(template, bos="<s>", eos="</s>"):
    tokenizer = Tokenizer(models.BPE({}, []))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template
    ).apply_chat_template


def ours(template):
    return ChatTemplate(template, bos_token="<s>", eos_token="</s>").render


def chat(**message):
    return [{"role": "user", "content": "hi", **message}]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize(
    "options", [{}, {"tools": TOOLS}, {"enable_thinking": False}], ids=["plain", "tools", "kwargs"]
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_equals_that_of_transformers(template, messages, options, add_generation_prompt):
    asked = {"add_generation_prompt": add_generation_prompt, **options}
    assert ours(template)(messages, **asked) == published(template)(messages, tokenize=False, **asked)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("ending", ["The answer is", "The answer is ", "", "two\nlines"])
def test_the_last_message_can_be_left_open(template, ending):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ending}]
    asked = {"add_generation_prompt": False, "continue_final_message": True}
    text = ours(template)(messages, **asked)
    assert text == published(template)(messages, tokenize=False, **asked)
    assert text.rstrip().endswith(ending.rstrip())


def test_text_parts_of_the_last_message_can_be_left_open():
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</end>{% endfor %}"
    messages = chat(content=[{"type": "text", "text": "one "}, {"type": "text", "text": "two "}])
    asked = {"add_generation_prompt": False, "continue_final_message": True}
    assert ours(template)(messages, **asked) == published(template)(messages, tokenize=False, **asked) == "one two "


def test_the_messages_are_not_changed():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "r", "x": None}]
    before = json.dumps(messages)
    ours(QWEN3_LIKE)(messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


def test_the_template_for_tools_is_taken_when_there_are_tools():
    render = ours({"default": "plain", "tool_use": "with tools"})
    assert (render(chat()), render(chat(), tools=TOOLS)) == ("plain", "with tools")


def test_json_is_written_as_models_were_trained_on_it():
    assert ours("{{ messages[0] | tojson }}")(chat(content="é<&>'")) == '{"role": "user", "content": "é<&>\'"}'


def test_the_year_can_be_asked_for():
    assert len(ours("{{ strftime_now('%Y') }}")(chat())) == 4


def test_changing_methods_do_not_exist_for_a_template():
    assert ours("{{ messages.append is defined }}")(chat()) == "False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages | attr('__class__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__dict__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '%s' | format(raise_exception.__globals__) }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ strftime_now.__closure__ }}",
        "{{ dict.__globals__ }}",
        "{% for m in messages | map(attribute='__class__') %}{{ m }}{% endfor %}",
    ],
)
def test_a_template_cannot_reach_the_interpreter(template):
    with pytest.raises(ChatTemplateError, match=r"sandbox forbids"):
        ours(template)(chat())


@pytest.mark.parametrize("template", ["{% include 'x' %}", "{% import 'os' as os %}", "{% extends 'x' %}"])
def test_a_template_cannot_load_another(template):
    with pytest.raises(ChatTemplateError):
        ours(template)(chat())


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(9999999) %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10 ** 100000000 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(template, few_steps):
    with pytest.raises(ChatTemplateError):
        ours(template)(chat())


GROWS = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
"""A list whose parts are the list before, twice: 60 lists in memory, 2 ** 60 when it is written or compared."""

AGAIN = "{% set other = ns.x %}" + GROWS


@pytest.fixture
def few_steps(monkeypatch):
    """A template without end is stopped in a moment."""
    monkeypatch.setattr(template_sandbox, "_MAX_STEPS", 10_000)


@pytest.mark.parametrize(
    "expression",
    [
        "'a' | center(1000000000)",
        "'a'.ljust(1000000000)",
        "('a' | attr('center'))(1000000000)",
        "['a'] | map('center', 1000000000) | list",
        "'%1000000000d' % 1",
        "'%*d' % (1000000000, 1)",
        "'%1000000000d' | format(1)",
        "'{:1000000000}'.format(1)",
        "'{:{}}'.format(1, 1000000000)",
        "('{0}' * 100000).format('a' * 100000)",
        "('a' * 99999).replace('a', 'b' * 99999)",
        "('a' * 99999) | replace('', 'b' * 99999)",
        "('a' * 99999).join([''] * 99999)",
        "([''] * 99999) | join('a' * 99999)",
        "('\t' * 9999).expandtabs(999999)",
        "('a' * 9999).translate({97: 'b' * 999999})",
        "[1, 2] | tojson(indent=1000000000)",
        "[1, 2] | tojson(separators=('a' * 1000000, ':'))",
        "('a\n' * 9999) | indent(99999)",
        "(1).to_bytes(1000000000, 'big')",
        "[1] * 10000000000",
        "['a' * 4000000] * 9999 | string",
        "([[1] * 999] * 9999) | sum(start=[])",
        "'a' | urlize",
        "[1] | batch(1000000000, 1) | list",
        "7 | round(-1000000000)",
        "'%1000000000d' is odd",
        "('<' * 4000000) | escape | escape | escape",
    ],
)
def test_what_would_make_too_much_is_refused_before_it_is_made(expression):
    with pytest.raises(ChatTemplateError):
        ours("{% set x = " + expression + " %}")(chat())


@pytest.mark.parametrize(
    "use",
    [
        "{{ ns.x | string | length }}",
        "{{ ns.x | tojson | length }}",
        "{{ '%s' % ns.x }}",
        "{{ '{!r}'.format(ns.x) }}",
        "{{ ns.x ~ '' }}",
        "{{ [ns.x] | join | length }}",
        "{{ ns.x | upper }}",
        AGAIN + "{{ ns.x == other }}",
        AGAIN + "{{ ns.x in [other] }}",
        AGAIN + "{{ ns.x is eq(other) }}",
        AGAIN + "{{ [ns.x].index(other) }}",
        AGAIN + "{{ [ns.x, other] | sort | length }}",
    ],
)
def test_a_value_that_holds_itself_many_times_is_never_unfolded(use, few_steps):
    with pytest.raises(ChatTemplateError, match="loop rounds and calls"):
        ours(GROWS + use)(chat())


def test_a_key_that_holds_itself_many_times_is_never_hashed(few_steps):
    pairs = GROWS.replace("x=[1]", "x=(1,)").replace("[ns.x, ns.x]", "(ns.x, ns.x)")
    for use in ("{ns.x: 1}", "{}[ns.x]", "{}.get(ns.x)", "[ns.x] | unique | list", "dict([(ns.x, 1)])"):
        with pytest.raises(ChatTemplateError, match="loop rounds and calls"):
            ours(pairs + "{% set y = " + use + " %}")(chat())


BIG = "{% set big = 'a' * 4000000 %}"


@pytest.mark.parametrize(
    "template",
    [
        BIG + "{% macro f() %}{% for i in range(9999) %}{{ big }}{% endfor %}{% endmacro %}{% set y = f() %}",
        BIG + "{% set y %}{% for i in range(9999) %}{{ big }}{% endfor %}{% endset %}",
        BIG + "{% for i in range(9999) %}{% set y = big[1:] %}{% endfor %}",
        BIG + "{% for i in range(9999) %}{% set y = big.count('b') %}{% endfor %}",
        BIG + "{% for i in range(9999) %}{% set y = 'b' in big %}{% endfor %}",
        BIG + "{% set y = " + " ~ ".join(["big"] * 50) + " %}",
        "{% set y %}{% for i in range(99999) %}" + "b" * 10000 + "{% endfor %}{% endset %}",
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [1] %}{% endfor %}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    ],
)
def test_what_a_template_makes_and_reads_is_counted_together(template):
    with pytest.raises(ChatTemplateError, match=r"characters|bits"):
        ours(template)(chat())


def test_a_render_ends_when_its_time_is_over(monkeypatch):
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr(template_sandbox.time, "thread_time", lambda: next(times))
    with pytest.raises(ChatTemplateError, match="seconds"):
        ours("{% for i in range(9999) %}{% endfor %}")(chat())


@pytest.mark.parametrize(
    "source",
    [
        " " * (1 << 17) + "x",
        "{{ [" + "1," * 30_000 + "1] }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "not " * 5000 + "1 }}",
        "{{ 1" + "+1" * 5000 + " }}",
        "{{ 'a'" + "|upper" * 5000 + " }}",
        "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
        "{% if 1 %}" + "{% elif 1 %}" * 5000 + "{% endif %}",
        "".join(f"{{% set a{i} = 1 %}}" for i in range(2500)) + "{% if 1 %}{% endif %}" * 2500,
        "{{ " + "9" * 5000 + " }}",
        "{% autoescape 'a' * 1000000000 %}{% endautoescape %}",
        "{% for x in [[1]] recursive %}{{ loop(x) }}{% endfor %}",
    ],
)
def test_a_source_that_is_too_large_or_too_deep_is_not_compiled(source):
    with pytest.raises(ChatTemplateError, match="compile"):
        ChatTemplate(source).compile()


def test_nothing_is_computed_while_a_template_is_compiled():
    ours("{% if false %}{{ 'a' | center(1000000000) }}{{ 2 ** 10 ** 9 }}{{ 'a' | upper }}{% endif %}")(chat())
    ChatTemplate("{{ 'a' | center(1000000000) | length }}").compile()


def test_what_templates_use_is_what_jinja_makes_of_it():
    template = """{% for m in messages %}{{ m.role|upper ~ ':' ~ loop.index ~ m.content|default('')|trim|replace('a','b')|indent(4) }}
{{ '%s-%d' % (m.role, loop.index) }}{{ "{}|{:>5}".format(m.role, loop.index) }}{% for k, v in m|dictsort %}{{ k }}{% endfor %}
{{ m.content.split('\n')[-1].lstrip().title() }}{{ loop.previtem.role if loop.previtem else 'none' }}{{ loop.length }}
{{ loop.cycle('a', 'b') }}{{ loop.revindex }}{% endfor %}{{ messages|map(attribute='role')|join(',') }}{{ [3, 1, 2]|sort|first }}
{{ [1, 2]|sum }}{{ [1, 5]|max }}{{ messages|last|length }}{{ 'abc'|reverse }}{{ [1, 2]|reverse|list }}{{ 3.7|round|int }}
{{ 'a<b'|e }}{{ 'x'|safe + '<' }}{{ ['a', 'b', 'a']|unique|join }}{{ {'a': [1, {'b': none}]} }}{{ {'a': 1}|tojson(indent=2) }}
{{ none }}{{ 1.5 }}{{ nothing }}{{ 'a b c'|truncate(3) }}{{ 'a b'|wordcount }}{{ 'hi'|center(10) }}{{ -3|abs }}{{ 5 is odd }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ messages|rejectattr('content', 'none')|list|length }}
{{ none|selectattr('a')|list }}{{ nothing|map('upper')|list }}{{ none|map('upper')|list }}{{ 'a\nb'|indent('> ', true) }}
{{ ['a', 'b']|truncate(3) }}{{ 'abc'[1:] }}{{ messages[1:]|length }}{{ dict(a=1).a }}{{ range(3)|list }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 'a' * 3 }}{{ [1] + [2] }}{{ 'A' is upper }}{{ ('a', 'b')|join('-') }}
{% macro f(x, n=2) %}{{ x }}{% if n %}{{ f(x, n - 1) }}{% endif %}{{ caller() if caller else '' }}{% endmacro %}{{ f('y') }}
{% call f('z') %}called{% endcall %}{% filter upper %}text{% endfilter %}{% set q %}set{% endset %}{{ q }}{{ 'a' in q }}"""
    messages = CHATS["several turns"]
    assert ours(template)(messages) == published(template)(messages, tokenize=False, add_generation_prompt=True)


def test_what_a_failing_template_says_is_cut():
    with pytest.raises(ChatTemplateError) as info:
        ours("{{ raise_exception('a' * 999999) }}")(chat())
    assert len(str(info.value)) < 2000


def test_arguments_that_are_nested_without_end_are_refused():
    deep = []
    for _ in range(500):
        deep = [deep]
    for given in ({"documents": deep}, {"tools": [{"a": deep}]}):
        with pytest.raises(ChatTemplateError, match="deep"):
            ours("x")(chat(), **given)
    with pytest.raises(ChatTemplateError, match="deep"):
        ours("x")(chat(content=deep))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", r"does not compile \(line 1\)"),
        ("{% for x in messages %}", "does not compile"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_failing_template_is_one_kind_of_error_that_says_why(template, says):
    with pytest.raises(ChatTemplateError, match=says):
        ours(template)(chat())


def test_a_broken_template_breaks_nothing_until_it_is_used_or_compiled():
    template = ChatTemplate({"default": "x", "tool_use": "{% if %}"})
    assert template.render(chat()) == "x"
    with pytest.raises(ChatTemplateError, match="does not compile"):
        template.compile()


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user"}, ["hi"], None, chat(content={1, 2}), chat(x=object())])
def test_what_is_not_a_chat_is_refused(messages):
    with pytest.raises(ChatTemplateError):
        ours("x")(messages)


@pytest.mark.parametrize("message", [{"content": None}, {"content": 3}, {"content": [{"type": "image"}]}])
def test_a_message_without_text_cannot_be_continued(message):
    with pytest.raises(ChatTemplateError, match="continue_final_message"):
        ours("{{ messages[0].content }}")(chat(**message), add_generation_prompt=False, continue_final_message=True)


def test_a_template_that_drops_the_last_message_cannot_continue_it():
    with pytest.raises(ChatTemplateError, match="drops or rewrites"):
        ours("{# content #}x")(chat(), add_generation_prompt=False, continue_final_message=True)


def test_continuing_and_opening_a_new_message_exclude_each_other():
    with pytest.raises(ChatTemplateError, match="exclude each other"):
        ours(QWEN3_LIKE)(chat(), continue_final_message=True)


@pytest.mark.parametrize("source", [{}, {"tool_use": "x"}, {"default": 3}])
def test_templates_without_a_usable_default_are_refused(source):
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source)


def test_threads_can_share_a_template():
    render = ours(QWEN3_LIKE)
    chats = [chat(content=f"question {i}") for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, chats)) == [render(c) for c in chats]


def test_another_template_can_take_over_the_special_tokens():
    template = ChatTemplate("x", bos_token="<s>", special_tokens={"pad_token": "<p>"})
    assert template.with_source("{{ bos_token }}{{ pad_token }}").render(chat()) == "<s><p>"
