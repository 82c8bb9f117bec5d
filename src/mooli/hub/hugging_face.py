"""What Hugging Face says of a model, asked through `huggingface_hub`.

Owns the question, the addresses of files, and what each refusal means. Login, tokens (HF_TOKEN), proxies and mirrors
(HF_ENDPOINT) are the library's. Never fetches a file: the library's current version drops what it had of a file when
the connection is cut, so `transfer` does that.
"""

from __future__ import annotations

import os

from mooli.errors import DownloadError, ModelNotFoundError
from mooli.hub.repository import HUGGING_FACE, RemoteFile, Repository
from mooli.version import __version__


def ask(name: str, revision: str | None, *, timeout_s: float) -> Repository:
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
