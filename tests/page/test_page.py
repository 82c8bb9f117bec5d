"""The page at / and /docs in real browsers, on real servers around the fake engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import KINDS, Browser, find_browser
from fake_engine import says
from gate import Gate
from live import LiveServer

RULES = (Path(__file__).parent / "rules.js").read_text(encoding="utf-8")
BEHIND = "assistant: "
"""What the fake model answers comes behind these words of its chat template."""

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "[a](javascript:window.hacked=3) [b](JaVaScRiPt:window.hacked=4) [c](data:text/html,x) [d](http://a.example/)\n"
    "<iframe srcdoc='<script>parent.hacked = 5</script>'></iframe> ![e](http://evil.example/e.png)\n\n"
    "| <b onmouseover=hacked()>x</b> | y |\n|---|---|\n| </td><svg onload=window.hacked=6> | [f](vbscript:x) |\n\n"
    "```</code><script>window.hacked = 7</script>\n</pre><script>window.hacked = 8</script>\n```\n"
)
ANSWERED = (
    "document.querySelector('.composer button').textContent === 'Send'"
    " && !!document.querySelector('.turn.assistant .foot button')"
)


@pytest.fixture(scope="module", params=list(KINDS))
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser(request.param)
    if program is None:
        pytest.skip(f"no {request.param} is installed")
    with KINDS[request.param](program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(autouse=True)
def no_complaints(browser: Browser, live: Any) -> Iterator[None]:
    """Whatever a test does: nothing breaks the policy, and the console says nothing. Before its server ends, the page
    is left, and nothing of it kept."""
    yield
    violations, complaints = browser.violations, [text for text in browser.complaints if not is_expected(text)]
    browser.forget()
    browser.leave()
    assert violations == []
    assert complaints == []


def is_expected(text: str) -> bool:
    """Chromium tells of each answer with an error status, also of those that the page asks about on purpose."""
    is_gone = "status of 404" in text and "/v1/cache/nodes/" in text  # evicted or split since it was told
    return is_gone or any(f"status of {status}" in text for status in (400, 401, 403))


def open_chat(browser: Browser, server: LiveServer, **look: Any) -> None:
    browser.open(server.url + "/", **look)
    browser.wait("!!document.querySelector('.composer button:not(:disabled)')")


def send(browser: Browser, text: str) -> None:
    browser.fill(".composer textarea", text)
    browser.click(".composer button:not(:disabled)")


def answers(browser: Browser) -> list[str]:
    found: list[str] = browser.value(
        "[...document.querySelectorAll('.turn.assistant .body')].map((e) => e.innerText.trim())"
    )
    return found


def module(server: LiveServer, name: str) -> str:
    """The address of a file of the page."""
    html = server.http.get("/", headers={"Accept": "text/html"}).text
    return server.url + "/" + html.split('src="')[1].split('"')[0].rpartition("/")[0] + "/" + name


# -- chat --------------------------------------------------------------------------------------------------------------
def test_an_answer_is_shown_as_it_comes(browser: Browser, live: Any) -> None:
    with Gate() as gate:
        server = live(says("one **two** three", after=BEHIND), runner={"raises": gate})
        open_chat(browser, server)
        send(browser, "hi")
        gate.let(6)
        browser.wait("document.querySelector('.turn.assistant .body')?.innerText.includes('one')")
        assert "three" not in answers(browser)[0]
        assert browser.value("document.querySelector('.composer button').textContent") == "Stop"
        gate.open()
        browser.wait(ANSWERED)
    assert answers(browser) == ["one two three"]
    assert browser.value("document.querySelector('.turn.assistant .body strong').textContent") == "two"
    assert "prompt tokens from the cache" in browser.value("document.querySelector('.figures').innerText")


def test_stop_ends_the_request_in_the_engine(browser: Browser, live: Any) -> None:
    with Gate() as gate:
        server = live(says("x" * 100, after=BEHIND), runner={"raises": gate})
        open_chat(browser, server)
        send(browser, "hi")
        gate.let(4)
        browser.wait("document.querySelector('.turn.assistant .body')?.innerText.includes('x')")
        browser.click(".composer button.stop")
        browser.wait(ANSWERED)
        gate.open()
    assert browser.value("document.querySelector('.turn.assistant .note').textContent") == "Stopped."
    browser.wait("fetch('/v1/loads').then((r) => r.json()).then((r) => r.loads[0].num_running_reqs === 0)")
    assert len(answers(browser)[0]) < 100


def test_a_branch_shares_its_prefix_and_says_so(browser: Browser, live: Any) -> None:
    server = live(says("yes", after=BEHIND), engine={"context_length": 512})
    open_chat(browser, server)
    send(browser, "a first question")
    browser.wait(ANSWERED)
    send(browser, "and a second")
    browser.wait(ANSWERED + "&& document.querySelectorAll('.turn.assistant .foot button').length === 4")
    browser.value("[...document.querySelectorAll('.turn.user')][1].querySelector('.foot button').click()")
    browser.fill(".editor textarea", "and another")
    browser.click(".editor button.main")
    browser.wait(ANSWERED + "&& document.querySelectorAll('.turn.assistant .foot button').length === 4")
    browser.wait("!!document.querySelector('.shares')")
    assert browser.value("document.querySelector('.branches span').textContent") == "2/2"
    shared = len("user: a first question\nassistant: yes\nuser: and a")
    whole = shared + len("nother\nassistant: ")
    counts = browser.value("document.querySelectorAll('.figures')[1].querySelector('.cached-count').textContent")
    assert counts == f"{shared} of {whole} prompt tokens from the cache"
    assert str(shared) in browser.value("document.querySelector('.shares').textContent")
    # The earlier branch is still there.
    browser.click(".branches button")
    browser.wait("document.querySelector('.branches span').textContent === '1/2'")
    assert "and a second" in browser.value("document.querySelector('.log').innerText")


def test_what_came_from_the_cache_is_shaded(browser: Browser, live: Any) -> None:
    server = live(says("yes", after=BEHIND), engine={"context_length": 512})
    open_chat(browser, server)
    send(browser, "the same words")
    browser.wait(ANSWERED)
    send(browser, "new ones")
    browser.wait(
        "document.querySelectorAll('.turn.user')[0]?.querySelector('mark.cached')?.textContent === 'the same words'"
    )
    assert browser.value("document.querySelectorAll('.turn.user')[1].querySelector('mark')") is None
    browser.wait("!!document.querySelectorAll('.turn.assistant')[1].querySelector('.read mark')")
    read = browser.value("document.querySelectorAll('.turn.assistant')[1].querySelector('.read mark').textContent")
    assert read == "user: the same words\nassistant: yes"


def test_hostile_answers_and_prompts_run_nothing(browser: Browser, live: Any) -> None:
    server = live(says(HOSTILE, after=BEHIND), engine={"context_length": 4096})
    open_chat(browser, server)
    send(browser, "hi")
    browser.wait(ANSWERED)
    assert "window.hacked = 1" in answers(browser)[0]
    links = browser.value("[...document.querySelectorAll('.log a')].map((a) => [a.href, a.rel, a.target])")
    assert {link[0] for link in links} == {"http://a.example/", "http://evil.example/e.png"}
    assert all("noopener" in rel and "noreferrer" in rel and target == "_blank" for _, rel, target in links)
    assert (
        browser.value("document.querySelectorAll('.log :is(script, img, iframe, svg, b, style, object)').length") == 0
    )
    browser.click(".side button")
    send(browser, HOSTILE[:200])
    browser.wait(ANSWERED)
    assert browser.value("document.querySelector('.turn.user .body').textContent") == HOSTILE[:200]
    assert browser.value("document.querySelectorAll('main :is(script, img, iframe, svg, style)').length") == 0
    assert browser.value("window.hacked") is None
    foreign = "performance.getEntriesByType('resource').filter((one) => !one.name.startsWith(location.origin)).length"
    assert browser.value(foreign) == 0


def test_conversations_outlive_the_page_and_go_through_a_file(browser: Browser, live: Any) -> None:
    server = live(says("kept", after=BEHIND))
    open_chat(browser, server)
    send(browser, "remember me")
    browser.wait(ANSWERED)
    browser.wait(
        "new Promise((resolve) => { const asked = indexedDB.open('mooli'); asked.onsuccess = () => {"
        "const all = asked.result.transaction('conversations').objectStore('conversations').getAll();"
        "all.onsuccess = () => { asked.result.close(); resolve(all.result.length === 1"
        " && Object.values(all.result[0].nodes).some((node) => node.content === 'kept')); } } })"
    )
    open_chat(browser, server)
    browser.wait("document.querySelector('.log').innerText.includes('kept')")
    turns = module(server, "turns.js")
    again = browser.value(
        f"import('{turns}').then((turns) => {{ const one = turns.newConversation(); one.settings.system = 's';"
        "turns.addNode(one, null, {role: 'user', content: 'q'});"
        "const id = turns.addNode(one, one.leaf, {role: 'assistant', content: 'a', calls: [], stats: {prompt: 3}});"
        "turns.addNode(one, '1', {role: 'assistant', content: 'b'});"
        "const [read] = turns.readFile(turns.writeFile([one]));"
        "return [turns.messagesOf(read), turns.siblingsOf(read, id), read.id !== one.id]; })"
    )
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b"},
    ]
    assert again == [messages, ["2", "3"], True]
    head = '{"format": "mooli-conversations", "version": '
    for wrong in (
        "{}", "[]", head + "2}", head + "1}",
        head + '1, "conversations": [{"nodes": {"1": {"id": 1, "parent": 1, "role": "user"}}}]}',
        head + '1, "conversations": [{"nodes": {"1": {"id": 1, "parent": null, "role": "x"}}}]}',
    ):  # fmt: skip
        refused = browser.value(
            f"import('{turns}').then((turns) => {{ try {{ turns.readFile({json.dumps(wrong)}); return false; }}"
            "catch { return true; } })"
        )
        assert refused, wrong


def test_schemas_tools_and_results_are_sent_as_the_api_has_them(browser: Browser, live: Any) -> None:
    server = live(says("yes", after=BEHIND), engine={"context_length": 512})
    open_chat(browser, server)
    schema, tools = {"type": "object"}, [{"name": "add", "parameters": {"type": "object"}}]
    body = browser.value(
        f"import('{module(server, 'turns.js')}').then((turns) => {{ const one = turns.newConversation();"
        f"one.settings.schema = {json.dumps(json.dumps(schema))}; one.settings.tools = {json.dumps(json.dumps(tools))};"
        "one.settings.temperature = '0.5'; one.settings.top_k = '';"
        "turns.addNode(one, null, {role: 'user', content: '1 + 2?'}); return turns.bodyOf(one, 'm', 'r'); })"
    )
    assert body["response_format"] == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert body["tools"] == [{"type": "function", "function": tools[0]}]
    assert (body["temperature"], "top_k" in body, body["model"]) == (0.5, False, "m")
    # A conversation that ends in a call: its result is asked for, and goes on with it.
    browser.value(
        f"Promise.all([import('{module(server, 'turns.js')}'), import('{module(server, 'store.js')}')])"
        ".then(async ([turns, { openStore }]) => { const one = turns.newConversation();"
        "turns.addNode(one, null, {role: 'user', content: '1 + 2?'});"
        "turns.addNode(one, one.leaf, {role: 'assistant', content: '', end: 'tool_calls', stats: {},"
        "calls: [{id: 'call_1', name: 'add', arguments: '{\"a\": 1}'}]});"
        "one.updated += 1e6; await (await openStore()).put(one); })"
    )
    open_chat(browser, server)
    browser.wait("document.querySelector('.call')?.innerText.includes('add')")
    assert browser.value(RULES) == []
    browser.fill(".calls textarea", "three")
    browser.click(".calls form button")
    browser.wait("[...document.querySelectorAll('.turn.assistant .body')].at(-1).innerText.trim() === 'yes'")
    browser.wait("[...document.querySelectorAll('.read')].at(-1)?.textContent.includes('three')")


def test_an_error_of_the_server_is_shown(browser: Browser, live: Any) -> None:
    server = live(says("yes", after=BEHIND))
    open_chat(browser, server)
    send(browser, "x" * 200)
    browser.wait("document.querySelector('.turn.assistant .error')?.textContent.includes('context length')")
    browser.fill(".settings textarea.code", "{no json")
    send(browser, "hi")
    browser.wait("document.querySelector('.log > .error')?.textContent.includes('JSON schema')")


# -- keys --------------------------------------------------------------------------------------------------------------
def test_a_key_is_asked_for_and_kept_by_the_tab_alone(browser: Browser, live: Any) -> None:
    server = live(says("yes", after=BEHIND), api_key="sesame")
    browser.open(server.url + "/")
    browser.fill("dialog input", "wrong")
    browser.click("dialog button.main")
    browser.wait("!!document.querySelector('dialog .error')")
    browser.fill("dialog input", "sesame")
    browser.click("dialog button.main")
    browser.wait("!document.querySelector('dialog') && !!document.querySelector('.composer button:not(:disabled)')")
    send(browser, "hi")
    browser.wait(ANSWERED)
    assert answers(browser) == ["yes"]
    assert browser.value("sessionStorage.getItem('mooli.key')") == "sesame"
    assert browser.value("JSON.stringify(localStorage).includes('sesame')") is False
    assert browser.value("document.cookie") == ""


# -- for everybody -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_everybody_can_use_it(browser: Browser, live: Any, width: int, theme: str) -> None:
    table = "# T\n\n| a | b |\n|---|--:|\n| 1 | `x` |\n\n> quoted\n\n- one\n- two\n\n```py\nprint(1)\n```\n[l](http://a.example)"
    server = live(says(table, after=BEHIND), engine={"context_length": 512})
    open_chat(browser, server, width=width, theme=theme)
    set_theme(browser, theme)
    assert browser.value(RULES) == []
    send(browser, "hi")
    browser.wait(ANSWERED)
    assert browser.value(RULES) == []


def set_theme(browser: Browser, theme: str) -> None:
    """By the page's own button: not every browser can be told what its user prefers."""
    browser.wait(
        f"document.documentElement.dataset.theme === {json.dumps(theme)}"
        " || (document.querySelector('.tools button:last-child').click(), false)"
    )


def test_it_speaks_chinese_too(browser: Browser, live: Any) -> None:
    server = live(says("yes", after=BEHIND))
    open_chat(browser, server)
    words = module(server, "words.js")
    missing = (
        f"import('{words}').then(({{ WORDS }}) => Object.entries(WORDS)"
        ".filter(([, both]) => both.length !== 2 || both.some((one) => !one)).map(([name]) => name))"
    )
    assert browser.value(missing) == []
    browser.click(".tools button")
    browser.wait(
        "document.documentElement.lang === 'zh-Hans' && document.querySelector('nav').innerText.includes('对话')"
    )
    browser.wait("document.querySelector('.composer button').textContent === '发送'")
    assert browser.value(RULES) == []
    browser.click(".tools button")
    browser.wait("document.documentElement.lang === 'en'")


def test_keys_alone_reach_everything_in_order(browser: Browser, live: Any) -> None:
    server = live(says("yes", after=BEHIND))
    open_chat(browser, server)
    browser.value("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(20):
        browser.press("Tab")
        reached.append(
            browser.value(
                "(() => { const one = document.activeElement; const style = getComputedStyle(one);"
                "window.passed = [...(window.passed ?? []), one]; return [one.textContent.slice(0, 20),"
                "style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1]; })()"
            )
        )
    # Without a screen Firefox gives its window no focus, and draws no outline: its order counts alone.
    if browser.value("document.hasFocus()"):
        assert all(has_outline for _, has_outline in reached), reached
    in_order = "window.passed.every((one, i) => !i || window.passed[i - 1].compareDocumentPosition(one) & 4)"
    assert browser.value(in_order), reached
    browser.value("document.querySelector('.composer textarea').focus()")
    for key in "hey":
        browser.press(key)
    browser.press("Enter")
    browser.wait(ANSWERED)
    assert browser.value("document.querySelector('.turn.user .body').textContent") == "hey"


# -- Markdown ----------------------------------------------------------------------------------------------------------
MARKDOWN = (
    "# Head\ntext *em* **strong** ***both*** ~~gone~~ `code` ``a ` b``\n\n1. one\n2. two\n   - in\n   - in two\n\n"
    "   more\n3. three\n\n- [ ] a\n* b\n\n| a | b |\n|:--|--:|\n| x \\| y | **z** |\n| short |\n\n> quote\n"
    "> - list\n\n---\n"
    "```python\nx = 1\n\n# no head\n```\nhttp://a.example/b_c_d). [t](https://b.example/x(y)z \"t\") <https://c.example>\n"
    "snake_case_word 2 * 3 * 4 a**b\n~~~\nopen"
)  # fmt: skip


def test_markdown_that_grows_ends_as_what_is_whole(browser: Browser, live: Any) -> None:
    server = live(says("yes"))
    open_chat(browser, server)
    found = browser.value(
        f"import('{module(server, 'markdown.js')}').then(({{ drawMarkdown, GrowingMarkdown }}) => {{"
        f"const text = {json.dumps(MARKDOWN)}; const wrong = []; const box = () => document.createElement('div');"
        "const whole = (end) => { const e = box();"
        "e.append(...drawMarkdown(text.slice(0, end))); return e.innerHTML; };"
        "for (const size of [1, 7, 40]) { const e = box(); const grown = new GrowingMarkdown(e);"
        "for (let at = 0; at < text.length; at += size) { grown.push(text.slice(at, at + size));"
        "if (e.innerHTML !== whole(at + size)) wrong.push([size, at]); } }"
        "return [wrong, whole(text.length)]; })"
    )
    wrong, whole = found
    assert wrong == []
    for part in (
        "<h3>Head</h3>", "<em>em</em>", "<strong>strong</strong>", "<strong><em>both</em></strong>", "<del>gone</del>",
        "<code>a ` b</code>", "<ol>", "<td>x | y</td>", '<td class="right"><strong>z</strong></td>', "<blockquote>",
        "<hr>", "# no head", "snake_case_word", "2 * 3 * 4", "a**b", 'href="https://b.example/x(y)z"',
        'href="http://a.example/b_c_d"', 'href="https://c.example/"',
    ):  # fmt: skip
        assert part in whole, (part, whole)


def test_markdown_of_a_hostile_size_is_drawn(browser: Browser, live: Any) -> None:
    """Each takes the time of a blink; what grows with the square of the length would not end within the limit."""
    server = live(says("yes"))
    open_chat(browser, server)
    for piece in (
        "*a",
        "[",
        "![](",
        "`a",
        "**a ",
        "> ",
        "- ",
        "_",
        "|a",
        "\\",
        "~~",
        "<http://",
        "[a](",
        "```\n",
        "***a*",
    ):
        drawn = browser.value(
            f"import('{module(server, 'markdown.js')}').then(({{ drawMarkdown }}) =>"
            f"drawMarkdown({json.dumps(piece)}.repeat(20000)).length)"
        )
        assert drawn > 0, piece


# -- the tree ----------------------------------------------------------------------------------------------------------
def open_view(browser: Browser, server: LiveServer, name: str, **look: Any) -> None:
    browser.open(f"{server.url}/#{name}", **look)
    browser.wait("!!document.querySelector('main h1')")


def generate(server: LiveServer, text: str, **fields: Any) -> None:
    params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    reply = server.http.post("/generate", json={"text": text, "sampling_params": params, **fields})
    assert reply.status_code == 200, reply.text


def num_nodes(at_least: int) -> str:
    return f"Number(document.querySelector('main').dataset.nodes) >= {at_least}"


def test_the_tree_grows_as_requests_run(browser: Browser, live: Any) -> None:
    server = live(says("yes"))
    open_view(browser, server, "tree")
    browser.wait("!!document.querySelector('.live.on') && document.querySelector('.empty').innerText.includes('empty')")
    generate(server, "the same beginning, then this")
    browser.wait(num_nodes(1))
    generate(server, "the same beginning, then something else")
    browser.wait(num_nodes(3))
    browser.wait("Number(document.querySelector('canvas').dataset.rects) === 3")
    browser.wait("document.querySelector('.beside').innerText.includes('of 39 prompt tokens cached')")
    # What is evicted is told.
    for i in range(12):
        generate(server, f"{i} {'x' * 80}")
    browser.wait("document.querySelector('.beside').innerText.includes('tokens from position')")


def test_the_tree_can_be_walked_by_keys_and_read_as_a_table(browser: Browser, live: Any) -> None:
    server = live(says("yes"))
    generate(server, HOSTILE[:60] + "one")
    generate(server, HOSTILE[:60] + "two")
    # As if a store had all full pages.
    server.core._scheduler._cache.watch.look_on_disk(len)
    open_view(browser, server, "tree")
    browser.wait(num_nodes(3))
    browser.wait("document.querySelector('canvas').dataset.stored === '3'")
    assert "17 pages on disk too" in browser.value("document.querySelector('.treebar').innerText")
    assert "on disk too" in browser.value("document.querySelector('.legend').innerText")
    browser.value("document.querySelector('canvas').focus()")
    browser.press("ArrowDown")
    said = "document.querySelector('#said').innerText"
    browser.wait(f"{said}.includes('tokens 0 to 60') && {said}.includes('pages on disk too')")
    browser.press("ArrowRight")
    browser.wait(f"{said}.includes('tokens 60 to')")
    browser.press("ArrowLeft")
    browser.wait(f"document.querySelector('.beside pre').textContent === {json.dumps(HOSTILE[:60])}")
    assert browser.value("document.querySelectorAll('.beside :is(script, img, iframe)').length") == 0
    browser.click(".treebar button[aria-pressed]")
    browser.wait("document.querySelectorAll('.tabled tbody tr').length === 3")
    assert browser.value(RULES) == []
    browser.click(".tabled tbody button")
    browser.wait(f"{said}.includes('Node')")
    assert browser.value("window.hacked") is None


class Slowly:
    """Goes into the runner as its `raises`: a tenth of a second a step, so that what runs can be looked at, until the
    end of the block."""

    def __init__(self) -> None:
        self._hurry = threading.Event()

    def __call__(self, batch: Any) -> None:
        self._hurry.wait(0.1)

    def __enter__(self) -> Slowly:
        return self

    def __exit__(self, *_: object) -> None:
        self._hurry.set()


LONG = {"max_new_tokens": 700, "temperature": 0, "ignore_eos": True}
"""More than a minute of such steps."""


def test_the_tree_finds_who_shares_a_prompt_and_follows_a_request(browser: Browser, live: Any) -> None:
    with Slowly() as slowly:
        server = live(says("y"), runner={"raises": slowly}, engine={"context_length": 790})
        open_view(browser, server, "tree")
        browser.wait("!!document.querySelector('.live.on')")
        generate(server, "a beginning that is kept>")
        body = {"text": "a beginning that is used>", "stream": True, "rid": "followed", "sampling_params": LONG}
        with server.http.stream("POST", "/generate", json=body):
            item = "[...document.querySelectorAll('.beside li')].find((one) => one.innerText.startsWith('followed'))"
            browser.wait(f"!!{item}?.querySelector('button')")
            browser.value(f"{item}.querySelector('button').click()")
            browser.wait(f"{item}?.querySelector('button').getAttribute('aria-pressed') === 'true'")
            browser.wait("Number(document.querySelector('canvas').dataset.answers) >= 1")
            browser.fill(".beside textarea", "a beginning that was")
            browser.value("document.querySelector('.beside form button').click()")
            browser.wait("document.querySelector('.beside form p').innerText.includes('17 of 20 tokens')")


SHAPES = {
    "star": "(i) => null",
    "chain": "(i) => (i ? i - 1 : null)",
    "bushes": "(i) => (i % 100 ? i - (i % 100) + Math.floor((i % 100) / 3) : null)",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_thousand_nodes_are_drawn_as_what_is_seen_of_them(browser: Browser, live: Any, shape: str) -> None:
    """Of the whole no more bars than lines of pixels allow; of a part those that lie in it; and each can be hit."""
    server = live(says("yes"))
    open_chat(browser, server)
    whole, part, near, wrong, retained = browser.value(
        f"Promise.all([import('{module(server, 'icicle.js')}'), import('{module(server, 'forest.js')}')])"
        ".then(([{ draw, hit, layOut }, { Forest }]) => {"
        f"const parentOf = {SHAPES[shape]}; const forest = new Forest(); const nodes = []; const starts = [];"
        "for (let i = 0; i < 10000; i++) { const parent = parentOf(i);"
        "starts[i] = parent === null ? 0 : starts[parent] + 7;"
        "nodes.push({ id: i, parent, start: starts[i], tokens: 7, namespace: 1, retained: i === 0 }); }"
        "forest.begin([{ at: 0, version: 1, nodes }]); const layout = layOut(forest);"
        "const context = document.createElement('canvas').getContext('2d'); const size = { width: 800, height: 500 };"
        "const colours = { steps: 2, of: ['#000', '#fff'], inkOn: ['#fff', '#000'], held: '#000', chosen: '#000' };"
        "const marks = { selected: null, path: new Set(), found: new Set(), answers: new Map() };"
        "const drawn = (view) => draw(context, size, layout, view, colours, marks, 0, () => '');"
        "const fit = { left: 0, top: 0, perToken: 800 / layout.maxEnd, perRow: 500 / layout.numRows };"
        "const close = { left: 0, top: 0, perToken: 10, perRow: 20 };"
        "const near = nodes.filter((one) => { const i = layout.place.get(one.id);"
        "return one.start * 10 < 800 && layout.row[i] * 20 < 500; }).length;"
        "const wrong = nodes.filter((one) => { const i = layout.place.get(one.id);"
        "return hit(layout, { left: 0, top: 0, perToken: 1, perRow: 1 },"
        " one.start + 3, layout.row[i] + 0.5)?.id !== one.id; }).length;"
        "return [drawn(fit).rects, drawn(close).rects, near, wrong, drawn(close).retained]; })"
    )
    assert 0 < whole <= 1500
    assert 0 < part <= near < 10_000
    assert (wrong, retained) == (0, 1)


# -- now ---------------------------------------------------------------------------------------------------------------
def test_what_runs_is_shown(browser: Browser, live: Any) -> None:
    with Slowly() as slowly:
        server = live(says("z"), runner={"raises": slowly}, engine={"context_length": 790})
        body = {"text": "hello", "stream": True, "rid": "watched", "sampling_params": LONG}
        with server.http.stream("POST", "/generate", json=body):
            open_view(browser, server, "now")
            browser.wait("document.querySelector('.part')?.innerText.includes('watched')")
            assert browser.value("document.querySelector('.tile .big').innerText") == "1"
    browser.wait("document.querySelector('.part').innerText.includes('No request is running')")
    browser.wait("[...document.querySelectorAll('.part th')].some((one) => one.innerText === 'model_path')")
    browser.fill(".part input[type=search]", "page_size")
    assert (
        browser.value("[...document.querySelectorAll('.part tr[data-name]')].filter((one) => !one.hidden).length") == 1
    )
    assert browser.value(RULES) == []


def test_the_log_is_for_admins(browser: Browser, live: Any) -> None:
    server = live(says("yes"), api_key="user", admin_api_key="root")
    open_view(browser, server, "now")
    browser.fill("dialog input", "user")
    browser.click("dialog button.main")
    browser.wait("document.querySelector('main').innerText.includes(\"who has an admin's key\")")
    browser.value("sessionStorage.setItem('mooli.key', 'root')")
    open_view(browser, server, "now")
    browser.wait("!document.querySelector('.logtail').hidden && document.querySelectorAll('.tile').length > 0")
    assert not browser.value("document.querySelector('main').innerText.includes(\"who has an admin's key\")")


# -- the API -----------------------------------------------------------------------------------------------------------
def test_all_routes_are_shown_and_can_be_tried(browser: Browser, live: Any) -> None:
    server = live(says("yes", after=BEHIND))
    browser.open(server.url + "/docs")
    browser.wait("document.querySelectorAll('.route').length > 20")
    shown = set(browser.value("[...document.querySelectorAll('.route summary code')].map((one) => one.textContent)"))
    assert shown == set(server.http.get("/openapi.json").json()["paths"])
    assert browser.value(RULES) == []
    route = "[...document.querySelectorAll('.route')].find((one) => one.dataset.words.startsWith('post /v1/chat/comp'))"
    browser.value(f"({route}).open = true")
    browser.wait(f"!!({route}).querySelector('form')")
    assert browser.value(f"({route}).querySelector('.schema').innerText.includes('max_completion_tokens')")
    assert browser.value(RULES) == []
    browser.value(f"({route}).querySelector('form button').click()")
    browser.wait(f"({route}).querySelector('.told').innerText.includes('data: [DONE]')")
    models = "[...document.querySelectorAll('.route')].find((one) => one.dataset.words.startsWith('get /v1/models '))"
    browser.value(f"({models}).open = true")
    browser.wait(f"!!({models}).querySelector('form')")
    browser.value(f"({models}).querySelector('form button').click()")
    browser.wait(f"JSON.parse(({models}).querySelector('.told').textContent || '{{}}').object === 'list'")
    browser.fill("input[type=search]", "tokenize")
    assert browser.value("[...document.querySelectorAll('.route')].filter((one) => !one.hidden).length") < 8


@pytest.mark.parametrize("view", ["tree", "now"])
@pytest.mark.parametrize(("width", "theme"), [(1280, "dark"), (360, "light")])
def test_everybody_can_watch(browser: Browser, live: Any, view: str, width: int, theme: str) -> None:
    server = live(says("yes"))
    generate(server, "something to see")
    open_view(browser, server, view, width=width)
    set_theme(browser, theme)
    ready = {"tree": num_nodes(1), "now": "document.querySelectorAll('.tile').length > 0"}[view]
    browser.wait(ready)
    assert browser.value(RULES) == []
