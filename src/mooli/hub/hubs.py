"""What Hugging Face and ModelScope say of a model, and HTTP requests to a hub.

Owns the questions, the addresses of files, what each refusal means, and what may be seen where: credentials go to the
host they are meant for and nowhere else, and an address that a hub redirects to is never shown, because it may hold a
signature. Never fetches a file, never retries: `transfer` does.

- Requests go through the standard library: proxies (HTTPS_PROXY, NO_PROXY) and certificates (SSL_CERT_FILE) are its.
- Hugging Face is asked through `huggingface_hub`: login, tokens (HF_TOKEN), proxies and mirrors (HF_ENDPOINT) are the
  library's. Its current version drops what it had of a file when the connection is cut, so it fetches none.
- ModelScope is asked through its HTTP API, whose two addresses are all that its client uses for models too; the client
  itself is 69 MB, or in its small form brings a cryptography library, and keeps its login as a pickle.
  MODELSCOPE_ENDPOINT (or MODELSCOPE_DOMAIN) names another address and MODELSCOPE_API_TOKEN a token, as for the client.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import IO, Any
from urllib.parse import quote, urlencode, urlsplit

from mooli.errors import DownloadError, ModelNotFoundError
from mooli.hub.repository import HUGGING_FACE, MODELSCOPE, RemoteFile, Repository
from mooli.version import __version__

# -- requests ----------------------------------------------------------------------------------------------------------

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


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def ask_hugging_face(name: str, revision: str | None, *, timeout_s: float) -> Repository:
    """The files of model `name` at `revision` (default: the hub's).

    Raises ModelNotFoundError for a model or revision that is not there, DownloadError for one that may not be read and
    for a hub that does not answer.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # The library reads its variables when it is imported; a program may set this one later.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="mooli", library_version=__version__)
    place = f"{name} on {HUGGING_FACE} ({api.endpoint})"
    try:
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=timeout_s)
    except GatedRepoError as exc:
        raise DownloadError(
            f"{place} is gated: accept its terms on its page, and log in with `hf auth login` or HF_TOKEN"
        ) from exc
    except RevisionNotFoundError as exc:
        raise ModelNotFoundError(f"{place} has no revision {revision}") from exc
    except RepositoryNotFoundError as exc:
        raise ModelNotFoundError(
            f"there is no model {place}, or it is private: then log in with `hf auth login` or HF_TOKEN"
        ) from exc
    except HfHubHTTPError as exc:
        raise DownloadError(f"{place} cannot be read: HTTP status {exc.response.status_code}") from exc
    except Exception as exc:  # of the library's HTTP client, which differs between its versions
        raise DownloadError(f"{HUGGING_FACE} ({api.endpoint}) does not answer: {type(exc).__name__}") from exc
    files = []
    for sibling in info.siblings or ():
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        if sibling.size is None:
            raise DownloadError(f"{place} does not tell the size of {sibling.rfilename}; try another endpoint")
        url = hf_hub_url(name, sibling.rfilename, revision=info.sha, endpoint=api.endpoint)
        digest, kind = (sha256, "sha256") if sha256 else (sibling.blob_id, "git")
        files.append(RemoteFile(sibling.rfilename, sibling.size, digest, kind, url))
    headers = build_hf_headers(library_name="mooli", library_version=__version__)
    credentials = {key: headers.pop(key) for key in list(headers) if key.lower() == "authorization"}
    return Repository(HUGGING_FACE, name, info.sha or "", tuple(files), headers, credentials)


# -- ModelScope --------------------------------------------------------------------------------------------------------

DEFAULT_REVISION = "master"

_ENDPOINT = "https://www.modelscope.cn"


def ask_modelscope(name: str, revision: str | None, *, timeout_s: float) -> Repository:
    """The files of model `name` at `revision` (default: the hub's).

    Raises ModelNotFoundError for a model or revision that is not there, DownloadError for one that may not be read and
    for a hub that does not answer.
    """
    endpoint = _endpoint()
    place = f"{name} on {MODELSCOPE} ({endpoint})"
    model = f"{endpoint}/api/v1/models/{quote(name)}"
    revision = revision or DEFAULT_REVISION
    headers = {"User-Agent": f"mooli/{__version__}"}
    credentials = _credentials()
    question = urlencode({"Revision": revision, "Recursive": "True"})
    try:
        answer = get_json(f"{model}/repo/files?{question}", headers, credentials, timeout_s=timeout_s)
        entries = _entries(answer)
    except HttpStatusError as exc:
        raise _refused(exc.status, place, revision) from exc
    except DownloadError as exc:
        raise DownloadError(f"{MODELSCOPE} ({endpoint}) does not answer: {exc}") from exc
    files = tuple(_file(entry, model, revision) for entry in entries if entry.get("Type") != "tree")
    return Repository(MODELSCOPE, name, revision, files, headers, credentials)


def _refused(status: int, place: str, revision: str) -> Exception:
    token = "give a token in MODELSCOPE_API_TOKEN"
    if status == 404:
        return ModelNotFoundError(f"there is no model {place} with revision {revision}, or it is private: then {token}")
    if status in (401, 403):
        return DownloadError(f"{place} is private, or its terms are not accepted (HTTP status {status}): {token}")
    return DownloadError(f"{place} cannot be read: HTTP status {status}")


def _entries(answer: Any) -> list[Mapping[str, Any]]:
    data = answer.get("Data") if isinstance(answer, dict) else None
    files = data.get("Files") if isinstance(data, dict) else None
    if not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
        raise DownloadError("its answer holds no list of files")
    return files


def _file(entry: Mapping[str, Any], model: str, revision: str) -> RemoteFile:
    path, size, digest = entry.get("Path"), entry.get("Size"), entry.get("Sha256") or None
    if not isinstance(path, str) or not isinstance(size, int) or not isinstance(digest, str | None):
        raise DownloadError(f"{MODELSCOPE} describes a file without a name or a size: {str(dict(entry))[:200]}")
    url = f"{model}/repo?{urlencode({'Revision': revision, 'FilePath': path})}"
    return RemoteFile(path, size, digest.lower() if digest else None, "sha256", url)


def _credentials() -> dict[str, str]:
    """Both ways of its API to show a token: older parts read the cookie, newer ones the header."""
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    if not token:
        return {}
    if not token.isprintable() or ";" in token:
        raise DownloadError("MODELSCOPE_API_TOKEN holds characters that no token has")
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}


def _endpoint() -> str:
    given = (os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "").strip()
    if not given:
        return _ENDPOINT
    return (given if given.lower().startswith(("http://", "https://")) else f"https://{given}").rstrip("/")
