"""Real browsers without a window: Chromium by the Chrome DevTools protocol, Firefox by WebDriver BiDi.

Both are a `Browser`, used from plain functions; the conversation with the browser is in a thread of its own. No package
drives them: the websocket is aiohttp's, which Mooli needs anyway. Which program: what MOOLI_TEST_BROWSER (Chromium) and
MOOLI_TEST_FIREFOX name, else one on the path.

Sources: Chrome DevTools Protocol 1.3; W3C WebDriver BiDi.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import aiohttp

PATIENCE_S = 60
"""Until a test gives up waiting for what should come at once, on a machine that may be busy."""

START_S = 180
"""Until a browser has started: on a busy machine it may take long."""

_NAMES = {
    "chromium": ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    "firefox": ("firefox-esr", "firefox"),
}
_NAMED_BY = {"chromium": "MOOLI_TEST_BROWSER", "firefox": "MOOLI_TEST_FIREFOX"}

_WATCH = """
window.seenViolations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.seenViolations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""
"""Runs in each document before its own scripts."""

T = TypeVar("T")


def find_browser(kind: str) -> str | None:
    named = os.environ.get(_NAMED_BY[kind])
    if named:
        return shutil.which(named)
    return next((found for name in _NAMES[kind] if (found := shutil.which(name))), None)


class Browser:
    """One browser with one tab. Use as a context manager: leaving it ends the browser.

    complaints: what the console said of errors and warnings, and exceptions, since `open`.
    """

    kind: str
    _arguments: tuple[str, ...]

    def __init__(self, program: str, folder: Path) -> None:
        self._folder = folder
        self.complaints: list[str] = []
        self._count = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._prepare()
        self._process = subprocess.Popen(
            [program, *self._command()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            env={**os.environ, "MOZ_HEADLESS": "1", "HOME": str(folder)},
            start_new_session=True,  # so that what it starts ends with it
        )  # fmt: skip
        try:
            self._run(self._connect(), START_S)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    # -- what tests do --
    def open(self, url: str, *, width: int = 1280, height: int = 800, theme: str = "light") -> None:
        """Load a page anew, and wait until it has loaded."""
        self._run(self._look(width, height, theme))
        self.leave()
        self.complaints.clear()
        self._run(self._navigate(url))

    def forget(self) -> None:
        """Have the present origin keep nothing: another server may get its port."""
        self.value(
            "new Promise((done) => { localStorage.clear(); sessionStorage.clear();"
            "const asked = indexedDB.deleteDatabase('mooli');"
            "asked.onsuccess = asked.onerror = asked.onblocked = () => done(true); })"
        )

    def leave(self) -> None:
        """Show nothing."""
        self._run(self._navigate("about:blank"))

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives, as JSON carries it; promises are awaited."""
        return self._run(self._evaluate(expression))

    def wait(self, expression: str) -> Any:
        """The first true value of an expression."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.value(expression)):
            if time.monotonic() > deadline:
                text = self.value("document.body.innerText")
                raise AssertionError(f"this has not happened: {expression}; the page shows: {text[-1500:]}")
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """As a user's click, on what is there or comes."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def fill(self, selector: str, text: str) -> None:
        """Have a field hold a text, as if it had been typed."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        self.value(
            f"(() => {{ const field = document.querySelector({json.dumps(selector)}); field.value = {json.dumps(text)};"
            "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def press(self, key: str) -> None:
        """A real key: a character, or "Tab", "Enter", "ArrowRight", …"""
        self._run(self._press(key))

    def picture(self, file: Path) -> None:
        """What is seen, as PNG."""
        file.write_bytes(base64.b64decode(self._run(self._picture())))

    @property
    def violations(self) -> list[str]:
        """Of the Content-Security-Policy, in the present document."""
        found: list[str] = self.value("window.seenViolations")
        return found

    # -- the browser's life --
    def _run(self, work: Coroutine[Any, Any, T], limit_s: float = PATIENCE_S) -> T:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, limit_s), self._loop).result()

    def _end(self) -> None:
        if hasattr(self, "_session"):
            with contextlib.suppress(Exception):
                self._run(self._disconnect())
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open_socket(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, max_msg_size=0)
        self._reading = asyncio.ensure_future(self._read())

    async def _disconnect(self) -> None:
        self._reading.cancel()
        await self._socket.close()
        await self._session.close()

    async def _read(self) -> None:
        async for frame in self._socket:
            message = json.loads(frame.data)
            waiting = self._answers.pop(message.get("id"), None)
            if waiting is not None:
                waiting.set_result(message)
            else:
                self._heard(message.get("method", ""), message.get("params", {}))

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        waiting = self._answers[self._count] = self._loop.create_future()
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        message = await waiting
        assert "error" not in message, message
        return dict(message["result"])

    async def _file_with(self, name: str) -> str:
        """The text of a file that the browser writes when it is ready."""
        file = self._folder / name
        while not (file.exists() and (text := file.read_text()).strip()):
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.kind} ended with status {self._process.returncode}")
            await asyncio.sleep(0.05)
        return text

    # -- what each does in its own words --
    def _prepare(self) -> None:
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    async def _connect(self) -> None:
        raise NotImplementedError

    def _heard(self, method: str, params: dict[str, Any]) -> None:
        raise NotImplementedError

    async def _look(self, width: int, height: int, theme: str) -> None:
        raise NotImplementedError

    async def _navigate(self, url: str) -> None:
        raise NotImplementedError

    async def _evaluate(self, expression: str) -> Any:
        raise NotImplementedError

    async def _press(self, key: str) -> None:
        raise NotImplementedError

    async def _picture(self) -> str:
        raise NotImplementedError


class Chromium(Browser):
    kind = "chromium"

    def _prepare(self) -> None:
        pass

    def _command(self) -> list[str]:
        return [
            "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-sandbox",
            "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--lang=en-US",
            "--remote-debugging-port=0", f"--user-data-dir={self._folder}", "about:blank",
        ]  # fmt: skip

    async def _connect(self) -> None:
        self._loaded = asyncio.Event()
        port = (await self._file_with("DevToolsActivePort")).split()[0]
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/json/list") as response,
        ):
            targets = await response.json()
        await self._open_socket(next(one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page"))
        for domain in ("Page", "Runtime", "Log"):
            await self._call(f"{domain}.enable")
        await self._call("Emulation.setFocusEmulationEnabled", enabled=True)
        await self._call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)

    def _heard(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    async def _look(self, width: int, height: int, theme: str) -> None:
        await self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    async def _navigate(self, url: str) -> None:
        self._loaded.clear()
        answer = await self._call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        await self._loaded.wait()

    async def _evaluate(self, expression: str) -> Any:
        answer = await self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def _press(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        await self._call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
        await self._call("Input.dispatchKeyEvent", type="keyUp", **event)

    async def _picture(self) -> str:
        return str((await self._call("Page.captureScreenshot", format="png"))["data"])


class Firefox(Browser):
    kind = "firefox"

    _KEYS: ClassVar[dict[str, str]] = {
        "Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c", "ArrowLeft": "\ue012", "ArrowUp": "\ue013",
        "ArrowRight": "\ue014", "ArrowDown": "\ue015",
    }  # fmt: skip

    def _prepare(self) -> None:
        wanted: dict[str, bool | int | str] = {
            "browser.shell.checkDefaultBrowser": False,
            "browser.startup.homepage_override.mstone": "ignore",
            "browser.aboutwelcome.enabled": False,
            "datareporting.policy.dataSubmissionEnabled": False,
            "app.update.enabled": False,
            "intl.accept_languages": "en-US, en",
            "remote.active-protocols": 1,
            "focusmanager.testmode": True,  # a window without a screen has the focus
        }
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in wanted.items()]
        (self._folder / "user.js").write_text("\n".join(lines))

    def _command(self) -> list[str]:
        profile = str(self._folder)
        return ["--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0", "about:blank"]

    async def _connect(self) -> None:
        told = json.loads(await self._file_with("WebDriverBiDiServer.json"))
        await self._open_socket(f"ws://{told['ws_host']}:{told['ws_port']}/session")
        await self._call("session.new", capabilities={})
        (first, *_) = (await self._call("browsingContext.getTree"))["contexts"]
        self._context = first["context"]
        await self._call("browsingContext.activate", context=self._context)  # so that it has the focus
        await self._call("session.subscribe", events=["log.entryAdded"])
        await self._call("script.addPreloadScript", functionDeclaration=f"() => {{ {_WATCH} }}")

    def _heard(self, method: str, params: dict[str, Any]) -> None:
        if method == "log.entryAdded" and params["level"] in ("error", "warn"):
            self.complaints.append(f"{params.get('text')} {params.get('stackTrace')}")

    async def _look(self, width: int, height: int, theme: str) -> None:
        await self._call(
            "browsingContext.setViewport", context=self._context, viewport={"width": width, "height": height}
        )

    async def _navigate(self, url: str) -> None:
        await self._call("browsingContext.navigate", context=self._context, url=url, wait="complete")

    async def _evaluate(self, expression: str) -> Any:
        answer = await self._call(
            "script.evaluate",
            expression=f"(async () => JSON.stringify(await ({expression})))()",
            target={"context": self._context},
            awaitPromise=True,
        )
        assert answer["type"] == "success", answer
        result = answer["result"]
        return json.loads(result["value"]) if result["type"] == "string" else None

    async def _press(self, key: str) -> None:
        value = self._KEYS.get(key, key)
        actions = [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        await self._call(
            "input.performActions",
            context=self._context,
            actions=[{"type": "key", "id": "keyboard", "actions": actions}],
        )

    async def _picture(self) -> str:
        return str((await self._call("browsingContext.captureScreenshot", context=self._context))["data"])


KINDS: dict[str, type[Browser]] = {"chromium": Chromium, "firefox": Firefox}
