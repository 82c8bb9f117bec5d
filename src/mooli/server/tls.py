"""What HTTPS needs, read and tried before a model is loaded.

Owns the way from the files that the configuration names to an SSLContext, and the words of what is wrong with them.
Never asks for a password: a server has no terminal.
"""

from __future__ import annotations

import ssl

from mooli.errors import ConfigError
from mooli.server.config import ServerConfig


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises ConfigError if the files cannot be used together."""
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    password = config.ssl_keyfile_password
    was_asked = False

    def give_password() -> str:
        nonlocal was_asked
        was_asked = True
        return password or ""

    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, give_password)
    except (ssl.SSLError, OSError, ValueError) as exc:
        pair = f"ssl_keyfile={config.ssl_keyfile!r} and ssl_certfile={config.ssl_certfile!r}"
        if was_asked and password is None:
            hint = "the key is encrypted: give ssl_keyfile_password"
        elif was_asked:
            hint = "ssl_keyfile_password is not the password of the key"
        elif getattr(exc, "reason", None) == "KEY_VALUES_MISMATCH":
            hint = "the key is not that of the certificate"
        else:
            hint = f"both must be PEM files that this process may read ({exc})"
        raise ConfigError(f"{pair} cannot be used: {hint}") from exc
    if config.ssl_ca_certs is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (ssl.SSLError, OSError) as exc:
            raise ConfigError(
                f"ssl_ca_certs={config.ssl_ca_certs!r} cannot be used: it must hold certificates in PEM ({exc})"
            ) from exc
    return context
