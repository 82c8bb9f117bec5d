"""A rank without torch and without a model, which does what its last argument says: see `mooli.engine.rank_process`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from mooli.engine import rank_process as m

PART_BYTES = 3
"""Of a page on one rank."""


def main() -> None:
    scenario, connection = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))

    def say(message: m.RankMessage) -> None:
        connection.sendall(m.encode(message))

    written: dict[int, bytes] = {}
    start = m.receive(connection, m.ToRank)
    say(m.Opened())
    if scenario == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    while (message := m.receive(connection, m.ToRank)) is not None:
        if isinstance(message, m.Stop):
            return
        if isinstance(message, m.Load):
            say(m.Loaded(1000 * start.rank, 10))
        if isinstance(message, m.ReadPages):
            say(m.PagesRead(b"".join(written.get(page, bytes(PART_BYTES)) for page in message.pages)))
        if isinstance(message, m.WritePages):
            parts = [message.data[at : at + PART_BYTES] for at in range(0, len(message.data), PART_BYTES)]
            written.update(zip(message.pages, parts, strict=True))
        if isinstance(message, m.Step):
            if scenario == "killed" and start.rank == 2:
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGKILL)
            if scenario == "killed":  # what follows from the other's end, and comes first
                say(m.Failed("CommunicationError", "connection closed", is_consequence=True))
                return
            if scenario == "raises":
                say(m.Failed("RuntimeError", "no such operation", is_consequence=False))
                return


if __name__ == "__main__":
    main()
