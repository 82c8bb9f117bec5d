"""What agents do to their histories, each named rightly: a tree of tokens, real templates and the words of the report."""

# ruff: noqa: E501 — a table of cases

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from chat_templates import DATED, LAST, TURNS
from fake_engine import EOS, _byte_alphabet
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mooli.frontend import cache_report, prompt_heads
from mooli.frontend.cache_report import Asked, CacheExplainer, Inquiry, Told
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.generation import Generation
from mooli.frontend.prompt_heads import PromptHead, PromptHeads
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tool_messages import read_tools
from mooli.frontend.tool_prompt import for_template
from mooli.types import CacheEnd, Request, RequestOutput

BASE = "engine"
SPECIALS = ("<eos>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>")


def made_tokenizer(template: str) -> Tokenizer:
    """Bytes and control tokens."""
    vocabulary = {char: byte for byte, char in enumerate(_byte_alphabet())}
    vocabulary |= {text: EOS + i for i, text in enumerate(SPECIALS)}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return Tokenizer(backend, eos_ids=[EOS], chat_template=ChatTemplate(template))


class Cache:
    """What is known of tokens, by namespace, and what a request finds of it: a tree without pages or bounds."""

    def __init__(self) -> None:
        self.known: dict[str, list[list[int]]] = {}

    def end_of(self, namespace: str, ids: list[int]) -> CacheEnd:
        best, had = 0, []
        for known in self.known.get(namespace, []):
            common = next(
                (i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids))
            )
            if common >= best:
                best, had = common, known[common : common + 16]
        if best >= len(ids) - 1:
            return CacheEnd(None, len(ids) - 1, len(ids) - 1)
        reason = "diverged" if had and best else "new" if namespace in self.known else "namespace"
        return CacheEnd(reason, best, best, had=tuple(had) if reason == "diverged" else ())


class Server:
    """Requests that ask, and what they are told. answer: what the model writes."""

    def __init__(self, template: str = TURNS) -> None:
        self.tokenizer = made_tokenizer(template)
        self.explainer = CacheExplainer(self.tokenizer, BASE)
        self.cache = Cache()
        self._num = 0

    def ask(
        self,
        body: dict[str, Any],
        *,
        answer: str = "Fine.",
        has_reasoned: bool = False,
        salt: str = "",
        tenant: str = "",
        previous: str | None = None,
    ) -> dict[str, Any]:
        inquiry, generation = self.begin(body, answer=answer, salt=salt, tenant=tenant, previous=previous)
        report = inquiry.report(generation, has_reasoned=has_reasoned)
        assert report is not None
        return report

    def begin(
        self, body: dict[str, Any], *, answer: str, salt: str = "", tenant: str = "", previous: str | None = None
    ) -> tuple[Inquiry, Generation]:
        self._num += 1
        tools = read_tools(body.get("tools"))
        arguments = {"add_generation_prompt": True, **body.get("arguments", {})}
        told, shown = for_template(self.tokenizer.chat_template, body["messages"], tools)
        ids = encode_chat(self.tokenizer, told, tools=shown, **arguments)
        namespace = BASE + ("/" + tenant + "/" + salt if salt or tenant else "")
        asked = Asked(f"r{self._num}", namespace, tenant, body.get("model", "m"), previous)
        inquiry = self.explainer.inquire(asked, len(ids), Told(body["messages"], tools, arguments))
        generation = Generation(Request(rid=asked.rid, prompt_ids=np.array(ids, np.int32)), self.tokenizer)
        written = self.tokenizer.encode(answer, add_special_tokens=False)
        output = RequestOutput(asked.rid, new_token_ids=written, cache_end=self.cache.end_of(namespace, ids))
        generation.update(output)
        self.cache.known.setdefault(namespace, []).append([*ids, *written[:-1]])
        return inquiry, generation


def tool(name: str, description: str = "does a thing") -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function}


def call(name: str, path: str) -> dict[str, Any]:
    function = {"name": name, "arguments": f'{{"path": "{path}"}}'}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": path, "type": "function", "function": function}]}


def said(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def history() -> dict[str, Any]:
    """Of an agent in the middle of its work."""
    return {
        "tools": [tool("look", "Looks at a file"), tool("run", "Runs a command"), tool("write", "Writes a file")],
        "messages": [
            said("system", "You are an agent. Today is 2026-12-01. The folder is /home/a."),
            said("user", "Repair the build."),
            call("look", "Makefile"),
            said("tool", "all: build", tool_call_id="Makefile"),
            said("assistant", "It needs a target.", reasoning_content="The file has no target named build."),
            said("user", "Then add one."),
            call("write", "Makefile"),
            said("tool", "written", tool_call_id="Makefile"),
        ],
    }


Edit = Callable[[dict[str, Any]], None]


def edits(what: str, change: Callable[[Any], Any]) -> Edit:
    """`change` of the value at a path such as "messages.0.content"."""

    def edit(body: dict[str, Any]) -> None:
        *path, last = [int(name) if name.isdigit() else name for name in what.split(".")]
        value: Any = body
        for name in path:
            value = value[name]
        value[last] = change(value[last])

    return edit


def of_messages(change: Callable[[list[Any]], Any]) -> Edit:
    return edits("messages", change)


GOES_ON = [said("assistant", "Fine."), said("user", "Is it done?")]

CASES: dict[str, tuple[Edit, str, str | None]] = {
    "nothing": (lambda body: None, "new", None),
    "date in the system prompt": (
        edits("messages.0.content", lambda text: text.replace("12-01", "12-02")), "diverged", "the system prompt: it was edited (near '2026-12-02')"),
    "time of day in the system prompt": (
        edits("messages.0.content", lambda text: text.replace("2026-12-01", "10:42")), "diverged", "the system prompt: it was edited (near '10:42')"),
    "folder in the system prompt": (
        edits("messages.0.content", lambda text: text.replace("/home/a", "/home/b")), "diverged", "the system prompt: it was edited"),
    "no system prompt any more": (of_messages(lambda m: m[1:]), "diverged", "the system prompt is gone"),
    "order of tools": (edits("tools", lambda tools: tools[::-1]), "diverged", "the tools are in another order"),
    "a tool more": (edits("tools", lambda tools: [*tools, tool("ask")]), "diverged", "tool ask is new"),
    "a tool less": (edits("tools", lambda tools: tools[:-1]), "diverged", "1 tool is gone"),
    "no tools in the last turn": (edits("tools", lambda tools: []), "diverged", "3 tools are gone"),
    "a tool for another": (edits("tools", lambda tools: [*tools[:-1], tool("ask")]), "diverged", "tool ask is new and 1 tool is gone"),
    "description of a tool": (
        edits("tools.1.function.description", lambda text: text + " (slow)"), "diverged", "tool run is described otherwise"),
    "schema of a tool": (
        edits("tools.1.function.parameters", lambda schema: {**schema, "required": []}), "diverged", "tool run is described otherwise"),
    "order of keys in a schema": (
        edits("tools.1.function.parameters", lambda schema: dict(reversed(schema.items()))), "diverged", None),
    "words of a user": (edits("messages.1.content", lambda text: text + " Now."), "diverged", "message 1 (user): it was edited"),
    "a reminder in an old message": (
        edits("messages.5.content", lambda text: text + "\n<reminder>stay brief</reminder>"), "diverged", "message 5 (user): it was edited"),
    "a result cut short": (edits("messages.3.content", lambda text: text[:3] + "…"), "diverged", "message 3 (tool): it was edited"),
    "a result cleared": (edits("messages.3.content", lambda text: "[cleared]"), "diverged", "message 3 (tool): it was edited"),
    "arguments of a call": (
        edits("messages.6.tool_calls.0.function.arguments", lambda text: '{"path": "other"}'), "diverged", "message 6 (assistant): its calls are others"),
    "two messages less at the beginning": (
        of_messages(lambda m: [m[0], *m[5:]]), "diverged", "message 1 (user): 4 messages before it are gone"),
    "all before the last question gone": (of_messages(lambda m: [m[0], *m[5:]][:2] + m[6:]), "diverged", "message 1 (user): 4 messages before it are gone"),
    "a summary instead of the history": (
        of_messages(lambda m: [m[0], said("user", "Summary: the build was repaired.")]), "diverged",
        "message 1 (user): it stands for messages that are gone: the history was compacted"),
    "a message put in": (
        of_messages(lambda m: [*m[:2], said("user", "By the way."), *m[2:]]), "diverged", "message 2 (user): 1 message was put in here"),
    "another role": (edits("messages.5.role", lambda role: "system"), "diverged", "message 5 (system): a system prompt is there that was not"),
    "the answer edited": (of_messages(lambda m: [*m[:-2], said("assistant", "Good."), m[-1]]), "diverged",
        "message 8 (assistant): it came back otherwise than the model wrote it"),
    "no thinking for this turn": (lambda body: body.update(arguments={"enable_thinking": False}), "new", None),
    "another salt": (lambda body: body.update(salt="s"), "namespace", None),
    "another tenant": (lambda body: body.update(tenant="t"), "namespace", None),
    "another model": (edits("messages.1.content", lambda text: text + "!"), "diverged", "another model was asked for"),
    "the same once more": (lambda body: body.update(messages=history()["messages"]), "none", None),
    "a turn taken back": (lambda body: body.update(messages=history()["messages"][:6]), "none", None),
    "another conversation": (
        lambda body: body.update(messages=[said("system", "You translate."), said("user", "Bonjour?")], tools=[]), "diverged", None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_an_agent_did_to_its_history_is_named(name: str) -> None:
    edit, reason, message = CASES[name]
    server = Server()
    first = server.ask(history())
    assert (first["reason"], first["lost_tokens"], first["previous_id"]) == ("new", 0, None)
    body = history()
    body["messages"] = body["messages"] + copy.deepcopy(GOES_ON)
    edit(body)
    if name == "another model":
        body["model"] = "other"
    named = "r1" if name == "a summary instead of the history" else None  # nothing else says whose it is
    report = server.ask(body, salt=body.pop("salt", ""), tenant=body.pop("tenant", ""), previous=named)
    assert report["reason"] == reason
    if name != "order of keys in a schema" and message is not None:
        assert report["message"] == message
    if name == "order of keys in a schema":
        assert report["message"].startswith("tool run")
    if name in ("nothing", "the same once more", "another conversation", "another tenant"):
        assert report["lost_tokens"] == 0
    if message is not None and reason == "diverged":
        assert report["lost_tokens"] > 0 and report["advice"] and report["previous_id"] == "r1"
        assert report["had"] != report["has"]
        assert max(len(report["had"]), len(report["has"])) <= 16 * 12


def test_reasoning_that_the_template_leaves_out() -> None:
    """A new question, and all reasoning before it is gone: what stands behind is computed again."""
    server = Server()
    body = history()
    called = {**call("look", "a"), "reasoning_content": "Look first."}
    body["messages"] = [*body["messages"][:2], called, said("tool", "text", tool_call_id="a")]
    server.ask(body)
    body["messages"] += [said("assistant", "Fine."), said("user", "Go on.")]
    report = server.ask(body)
    assert (report["reason"], report["message"]) == (
        "diverged", "message 2 (assistant): its reasoning is gone: the template leaves it out")  # fmt: skip
    assert report["had"].startswith("<think>"[:16]) and report["has"].startswith("\n<tool_call>")
    assert "reasoning" in report["advice"]


def test_reasoning_that_the_client_does_not_send_back() -> None:
    server = Server()
    body = history()
    body["messages"] = body["messages"][:2]
    server.ask(body, answer="<think>\nI look.\n</think>\n\nDone.", has_reasoned=True)
    body["messages"] += [said("assistant", "Done."), said("user", "Thanks.")]
    report = server.ask(body)
    assert (report["reason"], report["message"]) == ("diverged", "message 2 (assistant): its reasoning is gone")
    assert 0 < report["lost_tokens"] <= len("<think>\nI look.\n</think>\n\nDone.") + 1


def test_reasoning_that_the_client_took_out_of_an_old_message() -> None:
    server = Server()
    body = history()
    looking = said("assistant", "Looking.", reasoning_content="Look.")
    body["messages"] = [*body["messages"][:2], looking, said("tool", "x")]
    server.ask(body)
    del body["messages"][2]["reasoning_content"]
    report = server.ask(body)
    assert report["message"] == "message 2 (assistant): its reasoning is gone"


def test_a_date_that_the_template_writes() -> None:
    server = Server(DATED)
    body = {"messages": [said("system", "Help."), said("user", "Hello?")], "arguments": {"date_string": "01 Dec 2026"}}
    server.ask(body)
    body["messages"] += GOES_ON
    assert server.ask(body)["reason"] == "new"
    inquiry, generation = server.begin({**body, "arguments": {"date_string": "02 Dec 2026"}}, answer="x")
    assert inquiry.report(generation)["message"].endswith(
        "the template was told other arguments, such as how much to reason"
    )
    # The clock's date is no argument.
    inquiry.head.arguments = inquiry.previous.arguments
    again = cache_report.change_between(inquiry.previous, inquiry.head)
    assert again is not None and (again.kind, again.words) == (
        "system", "the template writes something else into it, such as the date")  # fmt: skip


def test_a_template_that_moves_the_system_prompt_loses_what_is_behind() -> None:
    server = Server(LAST)
    body = {"messages": [said("system", "Help."), said("user", "Hello?")]}
    server.ask(body)
    body["messages"] = body["messages"] + GOES_ON
    report = server.ask(body)
    assert report["reason"] == "diverged" and report["lost_tokens"] > 0 and "message 1" in report["message"]


def test_the_request_before_may_be_named_and_never_that_of_another_tenant() -> None:
    server = Server()
    server.ask(history(), tenant="a")
    other = {**history(), "messages": [*history()["messages"], *GOES_ON]}
    inquiry, generation = server.begin(other, answer="x", tenant="b", previous="r1")
    assert inquiry.is_missing and inquiry.report(generation)["previous_id"] is None
    inquiry, generation = server.begin(other, answer="x", tenant="a", previous="r1")
    assert not inquiry.is_missing and inquiry.missed(generation) is None
    assert inquiry.report(generation)["lost_tokens"] == 0
    other["messages"][1] = said("user", "Something else.")
    inquiry, generation = server.begin(other, answer="x", tenant="a", previous="r1")
    change = inquiry.missed(generation)
    assert change is not None and change.kind == "messages" and inquiry.num_missed(generation) > 50


def test_what_the_engine_says_stands_and_its_place_is_named() -> None:
    server = Server()
    server.ask(history())
    body = {**history(), "messages": [*history()["messages"], *GOES_ON]}
    inquiry, generation = server.begin(body, answer="x")
    at = len(server.tokenizer.encode(inquiry.text[: inquiry.text.index("all: build")], add_special_tokens=False))
    for reason, words in (
        ("evicted", "message 3 (tool): evicted 2.0 s ago, unused for 5.0 s then"),
        ("in flight", "message 3 (tool)"),
        ("judged slower", "message 3 (tool)"),
        ("load failed", "message 3 (tool)"),
        ("held back", "message 3 (tool)"),
        ("no state", "message 3 (tool)"),
    ):
        evicted = (2.0, 5.0) if reason == "evicted" else (None, None)
        generation.cache_end = CacheEnd(reason, at, at, 40, (), *evicted)
        report = inquiry.report(generation)
        assert (report["reason"], report["message"]) == (reason.replace(" ", "_"), words)
        assert (report["matched_tokens"], report["lost_tokens"], report["divergence_index"]) == (at, 40, at)
        assert report["had"] is None and report["advice"]
    generation.cache_end = CacheEnd("new", at, at)
    assert inquiry.report(generation)["reason"] == "evicted", "it was known, and it is not known since when not"
    generation.cache_end = None
    assert inquiry.report(generation) is None


def test_much_that_is_lost_is_a_line_of_the_log_and_not_often(caplog, monkeypatch) -> None:
    monkeypatch.setattr(cache_report, "MUCH_LOST", 50)
    server = Server()
    with caplog.at_level(logging.INFO, "mooli.frontend.cache_report"):
        server.ask(history())
        for i in range(3):
            body = history()
            body["messages"][1]["content"] += str(i)
            server.ask(body, previous="r1")
    (record,) = caplog.records
    assert "tokens lost: message 1 (user): it was edited" in record.getMessage()


def test_what_is_remembered_is_bounded_and_has_no_words(monkeypatch) -> None:
    monkeypatch.setattr(prompt_heads, "MAX_HEADS_OF_TENANT", 5)
    monkeypatch.setattr(prompt_heads, "MAX_HEADS", 12)
    heads = PromptHeads()
    for tenant in "abcd":
        for i in range(9):
            heads.add(PromptHead(f"{tenant}{i}", tenant, "", "", b"", (), 1))
            assert len(heads) <= 12
    assert heads.find("d", "d8") and not heads.find("d", "d3") and not heads.find("a", "d8")
    unit = prompt_heads.Unit("message", 0, "user", b"", b"", b"", b"", 1, False)
    monkeypatch.setattr(prompt_heads, "MAX_UNITS_IN_ALL", 25)
    for i in range(20):
        heads.add(PromptHead(f"x{i}", "x", "", "", b"", (unit,) * 10, 1))
        assert heads._num_units == sum(len(head.units) for head in heads._heads.values()) <= 25
    assert len(heads) == 2
    monkeypatch.setattr(prompt_heads, "MAX_UNITS", 4)
    server = Server()
    server.ask(history())
    (head,) = server.explainer._heads._heads.values()
    assert len(head.units) == 4
    assert "Repair" not in repr(head) and "target" not in repr(head)


def test_a_text_that_is_no_conversation_has_what_the_engine_says() -> None:
    explainer = CacheExplainer(None, BASE)
    inquiry = explainer.inquire(Asked("r", BASE), 10)
    generation = Generation(Request(rid="r", prompt_ids=np.arange(10, dtype=np.int32)), None)
    generation.update(RequestOutput("r", cache_end=CacheEnd("diverged", 4, 4, had=(7, 8))))
    assert inquiry.report(generation) == {
        "reason": "diverged", "matched_tokens": 4, "lost_tokens": 0, "divergence_index": 4, "message": None,
        "had": None, "has": None, "previous_id": None, "advice": None,
    }  # fmt: skip


def test_an_engine_says_it_in_meta_info(make_engine) -> None:
    engine = make_engine(context_length=120)
    text = "a text that is long enough"
    first, again = (engine.generate(text, {"max_new_tokens": 2}, return_cache_report=True) for _ in range(2))
    assert first["meta_info"]["cache_report"]["reason"] == "new"
    assert again["meta_info"]["cache_report"]["matched_tokens"] == len(text) - 1
    assert "cache_report" not in engine.generate(text, {"max_new_tokens": 2})["meta_info"]
    chunks = list(
        engine.generate([text, text[:9] + "?!x"], {"max_new_tokens": 3}, stream=True, return_cache_report=True)
    )
    other = [chunk["meta_info"]["cache_report"] for chunk in chunks if chunk["index"]]
    assert other and all(report == other[0] for report in other)
    assert (other[0]["reason"], other[0]["had"], other[0]["has"]) == ("diverged", text[9:25], "?!x")
    for samples in engine.generate([text], {"max_new_tokens": 2, "n": 3}, return_cache_report=True):
        assert samples["meta_info"]["cache_report"]["reason"] == "none"
    messages = [said("user", "hello you")]
    engine.chat(messages, {"max_new_tokens": 2}, return_cache_report=True)
    changed = engine.chat([said("user", "hello me")], {"max_new_tokens": 2}, return_cache_report=True)
    assert changed["meta_info"]["cache_report"]["message"] == "message 0 (user)"
    asked = engine.chat(
        [*messages, said("assistant", "x"), said("user", "y")], {"max_new_tokens": 1}, return_cache_report=True
    )
    assert asked["meta_info"]["cache_report"]["message"].startswith("message 1 (assistant): it came back otherwise")
    with pytest.raises(ValueError, match="return_cache_report"):
        engine.generate(text, return_cache_report=1)
