"""Server-sent events, as much of them as model servers use.

Owns cutting bytes into the payloads of `data:` lines. Never parses what is in them. See the HTML standard, section
"Server-sent events"; an event of several data lines is given as several payloads, for none of the servers sends one.
"""

from __future__ import annotations

DONE = b"[DONE]"


class EventStream:
    """Takes bytes as they come from the network and gives payloads as soon as their line is whole."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The payloads that `piece` completes, in order, without surrounding white space."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [payload for line in lines if (payload := _payload(line))]

    def close(self) -> list[bytes]:
        """What a stream without a last line break still held."""
        payload, self._rest = _payload(self._rest), b""
        return [payload] if payload else []


def _payload(line: bytes) -> bytes:
    return line[5:].strip() if line.startswith(b"data:") else b""
