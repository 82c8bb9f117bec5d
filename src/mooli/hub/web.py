"""HTTP requests to a hub, through the standard library: proxies (HTTPS_PROXY, NO_PROXY) and certificates
(SSL_CERT_FILE) are its own.

Owns what may be seen where: credentials go to the host they are meant for and nowhere else, and an address that a hub
redirects to is never shown, because it may hold a signature. Never retries.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import IO, Any
from urllib.parse import urlsplit

from mooli.errors import DownloadError

_MAX_JSON_BYTES = 32 << 20


class HttpStatusError(DownloadError):
    """The server answered with an error. retry_after_s: when it asks to be called again, None where it does not say."""

    def __init__(self, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        self.retry_after_s = retry_after_s


def open_url(
    url: str, headers: Mapping[str, str], credentials: Mapping[str, str], *, timeout_s: float
) -> http.client.HTTPResponse:
    """The open answer of a GET. timeout_s is of the connection and of each read.

    Raises HttpStatusError for a status of 400 and above, DownloadError where no answer came.
    """
    try:
        request = urllib.request.Request(url, headers=dict(headers))
        _check_scheme(url)
        for key, value in credentials.items():
            request.add_unredirected_header(key, value)
        opener = urllib.request.build_opener(_Redirects(credentials))
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout_s)
        return response
    except urllib.error.HTTPError as exc:
        with exc:
            raise HttpStatusError(exc.code, _seconds(exc.headers.get("Retry-After"))) from exc
    except urllib.error.URLError as exc:
        raise DownloadError(_words(exc.reason)) from exc
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise DownloadError(_words(exc)) from exc


def get_json(url: str, headers: Mapping[str, str], credentials: Mapping[str, str], *, timeout_s: float) -> Any:
    """The JSON answer of a GET. Raises as `open_url`, and DownloadError for what is no JSON or far too long."""
    with open_url(url, headers, credentials, timeout_s=timeout_s) as response:
        try:
            body = response.read(_MAX_JSON_BYTES + 1)
            if len(body) > _MAX_JSON_BYTES:
                raise DownloadError(f"its answer is longer than {_MAX_JSON_BYTES} bytes")
            return json.loads(body)
        except (OSError, http.client.HTTPException) as exc:
            raise DownloadError(_words(exc)) from exc
        except (ValueError, RecursionError) as exc:
            raise DownloadError("its answer is not JSON") from exc


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects with credentials on the same host only, and never from https to http."""

    def __init__(self, credentials: Mapping[str, str]) -> None:
        self._credentials = credentials

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _check_scheme(newurl)
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DownloadError("it redirects from https to an address that is not encrypted")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and _origin(newurl) == _origin(req.full_url):
            for key, value in self._credentials.items():
                # Only a request that had them keeps them: a way back from another host has not.
                if req.has_header(key.capitalize()):
                    request.add_unredirected_header(key, value)
        return request


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _check_scheme(url: str) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError("it is not an address of http or https")


def _seconds(text: str | None) -> float | None:
    """Retry-After as seconds; its form as a date (RFC 9110, 10.2.3) is passed over."""
    return float(text) if text is not None and text.strip().isdecimal() else None


def _words(reason: object) -> str:
    return str(reason) or type(reason).__name__
