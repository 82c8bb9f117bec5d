"""What ModelScope says of a model, asked through its HTTP API.

Owns the question, the addresses of files, and what each refusal means. The API's two addresses are all that its client
uses for models too; the client itself is 69 MB, or in its small form brings a cryptography library, and keeps its login
as a pickle, so it is not needed and not used. MODELSCOPE_ENDPOINT (or MODELSCOPE_DOMAIN) names another address and
MODELSCOPE_API_TOKEN a token, as for the client. Never fetches a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from mooli.errors import DownloadError, ModelNotFoundError
from mooli.hub.repository import MODELSCOPE, RemoteFile, Repository
from mooli.hub.web import HttpStatusError, get_json
from mooli.version import __version__

DEFAULT_REVISION = "master"

_ENDPOINT = "https://www.modelscope.cn"


def ask(name: str, revision: str | None, *, timeout_s: float) -> Repository:
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
