"""What the page costs: its size, the time to its first paint, and what it adds to a token's way to the eye.

A small server answers as Mooli does, with the files of the page, and streams tokens that each carry the time they were
sent. In Chromium, in turns: a bare reader of the stream notes when a token reaches JavaScript, and the chat when it
stands in the document. The difference is the page's. Both are read by one clock. The answer grows to `--tokens` words
of Markdown, so that late tokens find a long text.

    python benchmarks/page.py [--tokens 400] [--rounds 3] [--loads 15]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "page"))

from browsers import KINDS, Browser, find_browser

from mooli.server.page_files import page_files

PAUSE_S = 0.02
"""Between two tokens: 50 a second."""

CONTROL = """
(async () => {
  const reply = await fetch("/v1/chat/completions", { method: "POST", body: "{}" });
  const reader = reply.body.getReader();
  const decoder = new TextDecoder();
  const late = [];
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return late;
    text += decoder.decode(value, { stream: true });
    const now = performance.timeOrigin + performance.now();
    for (const [, stamp] of text.matchAll(/@([0-9.]+)@/g)) late.push(now - Number(stamp));
    text = text.slice(text.lastIndexOf("@") + 1);
  }
})()
"""

WATCH = """
(() => {
  window.late = [];
  const seen = new Set();
  new MutationObserver(() => {
    const now = performance.timeOrigin + performance.now();
    const body = document.querySelector(".turn.assistant:last-of-type .body");
    const text = [...(body?.children ?? [])].slice(-3).map((one) => one.textContent).join("");
    for (const [, stamp] of text.matchAll(/@([0-9.]+)@/g)) {
      if (seen.has(stamp)) continue;
      seen.add(stamp);
      window.late.push(now - Number(stamp));
    }
  }).observe(document.querySelector(".log"), { childList: true, subtree: true, characterData: true });
})()
"""


class StampedServer:
    """The files of the page, and the routes of a chat. url: where it is."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.url = f"http://127.0.0.1:{port}"

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_get("/", self._front)
        app.router.add_get("/page/{version}/{name}", self._file)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/detokenize", self._detokenize)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    async def _front(self, request: web.Request) -> web.Response:
        return web.Response(body=page_files().files["index.html"], content_type="text/html")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        return web.Response(body=page_files().files[name], content_type=kinds[name.rpartition(".")[2]])

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "stamps"}]})

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"text": ["a", "b"]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        usage: dict[str, Any] = {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
        for i in range(self._num_tokens):
            await asyncio.sleep(PAUSE_S)
            # Markdown of all kinds, and a new paragraph now and then, as answers have them.
            words = (" and", " **so** on,", " `code`", "\n- an item", " [a](http://a.example)", "\n\nThen")[i % 6]
            text = f"{words} @{time.time() * 1000:.3f}@"
            choice = {"index": 0, "delta": {"content": text}, "token_ids": [i], "finish_reason": None}
            if i == 0:
                choice["prompt_token_ids"] = [1, 2]
            chunk = {"choices": [choice], "usage": {**usage, "completion_tokens": i + 1}}
            await reply.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        return reply


def paints(browser: Browser, url: str, loads: int) -> list[float]:
    """Milliseconds from the start of navigation to the first paint with content."""
    paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    found = []
    for _ in range(loads):
        browser.open(url)
        found.append(float(browser.wait(paint)))
    return found


def chat_ms(browser: Browser, url: str, num_tokens: int) -> list[float]:
    browser.open(url)
    browser.wait("!!document.querySelector('.composer button:not(:disabled)')")
    browser.value(WATCH)
    browser.fill(".composer textarea", "go")
    browser.click(".composer button")
    browser.wait("document.querySelector('.composer button').textContent === 'Send' && window.late.length > 0")
    late: list[float] = browser.value("window.late")
    assert len(late) >= num_tokens * 0.95, len(late)
    return late


def row(name: str, values: list[float]) -> str:
    ordered = sorted(values)
    return f"| {name} | {statistics.median(ordered):.2f} | {ordered[int(len(ordered) * 0.99)]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=int, default=15)
    args = parser.parse_args()
    program = find_browser("chromium")
    if program is None:
        sys.exit("No Chromium is installed: apt install chromium")
    sizes = {name: len(content) for name, content in page_files().files.items()}
    print(f"size: {sum(sizes.values())} bytes in {len(sizes)} files")
    server = StampedServer(args.tokens)
    with tempfile.TemporaryDirectory() as folder, KINDS["chromium"](program, Path(folder)) as browser:
        first = paints(browser, server.url, args.loads)
        print(f"first paint, ms: median {statistics.median(first):.0f}, worst {max(first):.0f} of {len(first)} loads")
        bare: list[float] = []
        chat: list[float] = []
        for _ in range(args.rounds):
            browser.open(server.url)
            bare += browser.value(CONTROL)
            chat += chat_ms(browser, server.url, args.tokens)
        print("| ms from sending | median | p99 |\n| --- | --- | --- |")
        print(row("a bare reader", bare))
        print(row("the chat", chat))
        added = statistics.median(chat) - statistics.median(bare)
        print(f"the chat adds {added:.2f} ms")
        if added >= 5 or statistics.median(first) >= 100:
            sys.exit("more than the page may cost")


if __name__ == "__main__":
    main()
