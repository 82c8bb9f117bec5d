"""Makes the pictures of the page for the documents: a chat whose prompts come from the cache, and the tree behind it.

Of the tree some is on disk, and an answer is in the making.

    python tests/page/picture.py docs [MODEL]

Needs Chromium, and the demo model where no other is named. Nothing of it is a test.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from browsers import Chromium, find_browser
from server_process import ServerProcess

SYSTEM = (
    "You are a gardener who has grown radishes for forty years. You answer in a few plain words, and you like lists."
)
QUESTIONS = ("What does a radish need?", "When do I sow it?")
BRANCH = "And how do I eat it?"
OTHERS = ("Name three roots.", "Write a haiku about rain.", "What is a tree?", "Count to five.", "Why is the sky blue?")
DONE = (
    "document.querySelector('.composer button').textContent === 'Send'"
    " && document.querySelectorAll('.turn.assistant .foot button').length === {}"
)


def main(folder: Path, model: str) -> None:
    program = find_browser("chromium")
    if program is None:
        sys.exit("No Chromium is installed: apt install chromium")
    names = ("--random-seed", "1", "--served-model-name", "qwen2.5-coder-0.5b")
    with (
        tempfile.TemporaryDirectory() as kept,
        ServerProcess(*names, model=model, env={"MOOLI_KV_CACHE_DIR": kept}) as server,
        tempfile.TemporaryDirectory() as profile,
        Chromium(program, Path(profile)) as browser,
    ):
        browser.open(server.url, width=1280, height=760)
        browser.wait("!!document.querySelector('.composer button:not(:disabled)')")
        browser.fill(".settings textarea", SYSTEM)
        browser.fill(".numbers .field:nth-of-type(1) input", "0")
        browser.fill(".numbers .field:nth-of-type(4) input", "60")
        for i, question in enumerate(QUESTIONS):
            browser.fill(".composer textarea", question)
            browser.click(".composer button")
            browser.wait(DONE.format(2 * i + 2))
        browser.value("[...document.querySelectorAll('.turn.user')][1].querySelector('.foot button').click()")
        browser.fill(".editor textarea", BRANCH)
        browser.click(".editor button.main")
        browser.wait(DONE.format(4))
        browser.wait("!!document.querySelector('.shares') && document.querySelectorAll('.why').length === 2")
        browser.value("document.activeElement.blur()")
        browser.picture(folder / "page.png")
        threads = [threading.Thread(target=ask, args=(server.url, text, i)) for i, text in enumerate(OTHERS)]
        for thread in threads:
            thread.start()
        browser.open(server.url + "/#tree", width=1280, height=560)
        browser.wait("Number(document.querySelector('main').dataset.nodes) > 8")
        for thread in threads:
            thread.join()
        browser.wait("document.querySelector('.beside').innerText.includes('No request is running')")
        browser.open(server.url + "/#tree", width=1280, height=560)
        # The beginnings of the bars are read after their shape.
        browser.wait("Number(document.querySelector('canvas')?.dataset.read) > 8")
        browser.wait("Number(document.querySelector('canvas').dataset.stored) > 0")
        writing = threading.Thread(target=ask, args=(server.url, "Tell me a long story.", 1, 900))
        writing.start()
        browser.wait("Number(document.querySelector('canvas').dataset.answers) > 0")
        browser.picture(folder / "page_tree.png")
        writing.join()
    print(json.dumps({file.name: file.stat().st_size for file in sorted(folder.glob("page*.png"))}))


def ask(url: str, text: str, i: int, max_tokens: int = 30) -> None:
    messages = [{"role": "system", "content": SYSTEM if i % 2 else "Be short."}, {"role": "user", "content": text}]
    httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, "max_tokens": max_tokens}, timeout=300)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "demo")
