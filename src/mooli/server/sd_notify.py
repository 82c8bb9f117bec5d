"""What a server tells systemd about its life: READY=1, WATCHDOG=1, STOPPING=1.

Owns the datagram. Without systemd, which sets NOTIFY_SOCKET for units of `Type=notify`, nothing is sent.

Source: sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import socket

logger = logging.getLogger(__name__)


def sd_notify(state: str) -> bool:
    """Send `state`, such as "READY=1". Whether it was sent; a service manager that does not listen is no error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # Linux' abstract names begin with a zero byte
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.connect(address)
            link.setblocking(False)
            link.send(state.encode())
    except OSError as exc:
        logger.debug("systemd was not told %s: %s", state, exc)
        return False
    return True
