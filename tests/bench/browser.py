"""A browser without a window, driven by its own protocol (Chrome DevTools) over a websocket.

It is Chromium or Chrome: what MOOLI_TEST_BROWSER names, else one on the path. No package drives it: the websocket is
aiohttp's, which Mooli needs anyway.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START_S = 60

Result = TypeVar("Result")


def find_browser() -> str | None:
    named = os.environ.get("MOOLI_TEST_BROWSER")
    if named:
        return shutil.which(named)
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Tab:
    """One page.

    complaints: all its console said, and exceptions. loaded: all URLs it asked for.
    """

    socket: aiohttp.ClientWebSocketResponse
    complaints: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    _count: int = 0
    _seen: list[str] = field(default_factory=list)

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        await self.socket.send_json({"id": self._count, "method": method, "params": params})
        while True:
            message = await self._receive()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return dict(message["result"])

    async def open(self, file: Path, *, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self._seen.clear()
        await self.call("Page.navigate", url=file.resolve().as_uri())
        while "Page.loadEventFired" not in self._seen:
            await self._receive()

    async def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def point_at(self, x: float, y: float) -> None:
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    async def _receive(self) -> dict[str, Any]:
        message = json.loads((await self.socket.receive(timeout=START_S)).data)
        method, params = message.get("method", ""), message.get("params", {})
        self._seen.append(method)
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.loaded.append(params["request"]["url"])
        return dict(message)


def browse(browser: str, folder: Path, visit: Callable[[Tab], Awaitable[Result]]) -> Result:
    """Start the browser, let `visit` use a tab of it, and end it. folder: for its profile."""

    async def scenario() -> Result:
        command = [
            browser, "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-sandbox",
            "--disable-background-networking", "--disable-component-update", "--disable-extensions",
            "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(folder / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    targets = await response.json()
                url = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    return await visit(Tab(socket))
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    return asyncio.run(scenario())


async def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(START_S * 20):
        if process.poll() is not None:
            raise RuntimeError(f"the browser ended with status {process.returncode}")
        if file.exists() and (lines := file.read_text().split()):
            return int(lines[0])
        await asyncio.sleep(0.05)
    raise TimeoutError(f"the browser said nothing for {START_S} s")
