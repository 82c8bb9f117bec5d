"""Ray Serve on this machine, in a process of its own, as small as Ray can be: no dashboard, no usage reports, 80 MB of
shared memory, and no file outside of one folder.

Run as a program it is that process: it deploys each Serve config that comes as a line of JSON, answers with a line, and
shuts all down when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

PATIENCE_S = 120
DEPLOY_PATIENCE_S = 300
"""Some ten processes start, each of which imports Ray: ten seconds, and two minutes beside much other work."""

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's least is 75 MB."""


def run(folder: str) -> None:
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints goes to the log
    ray.init(
        num_cpus=8, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=folder,
        _system_config={"prestart_worker_first_driver": False},
    )  # fmt: skip
    for line in sys.stdin:
        schema = ServeDeploySchema.parse_obj(json.loads(line))
        if serve.context._global_client is None:
            serve.start(http_options=schema.http_options.dict())
        try:
            client = _get_global_client()
            client.deploy_apps(schema)
            answer = {"error": wait_for(client)}
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=out, flush=True)
    serve.shutdown()
    ray.shutdown()


def wait_for(client: Any) -> str | None:
    """Until the application runs as it was asked for; why it does not."""
    deadline = time.monotonic() + DEPLOY_PATIENCE_S
    while time.monotonic() < deadline:
        found = [status.app_status for status in client.list_serve_statuses()]
        if found and all(status.status == "RUNNING" for status in found):
            return None
        failed = [status.message for status in found if status.status == "DEPLOY_FAILED"]
        if failed:
            return failed[0]
        time.sleep(0.05)
    return f"not running after {DEPLOY_PATIENCE_S} s"


class RayCluster:
    """Use as a context manager: leaving it ends every process of Ray, whatever state it is in.

    port: where Serve listens. arguments: of `mooli.ray:app`.
    """

    def __init__(self, port: int, arguments: dict[str, Any]) -> None:
        self._folder = tempfile.mkdtemp(prefix="ray")  # Ray's socket paths leave little room for a longer name
        self._schema = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [{"name": "mooli", "import_path": "mooli.ray:app", "args": arguments}],
        }
        environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # else a token is written into the home folder
            "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",  # where /dev/shm is smaller still
            "RAY_DEDUP_LOGS": "0",
            "TMPDIR": self._folder,
        }
        self._log = open(Path(self._folder, "log"), "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, self._folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def __enter__(self) -> RayCluster:
        try:
            self.deploy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        pids = [self.process.pid, *descendants(self.process.pid)]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        killer = threading.Timer(60, self.process.kill)
        killer.start()
        self.process.wait()
        killer.cancel()
        self.process.stdout.close()
        left = _still_there(pids)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        assert not left, "processes of Ray are left"

    def deploy(self, **num_replicas: int) -> None:
        """Waits until it is as asked for. num_replicas: by deployment, with _ for -."""
        (application,) = self._schema["applications"]
        application["deployments"] = [
            {"name": name.replace("_", "-"), "num_replicas": count} for name, count in num_replicas.items()
        ]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(self._schema) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log
        answer = json.loads(line)
        assert answer["error"] is None, f"{answer['error']}\n{self.log}"

    @property
    def log(self) -> str:
        return Path(self._folder, "log").read_text(errors="replace")[-20_000:]

    def actors(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas."""
        title = f"ray::ServeReplica:mooli:{deployment}"
        return [pid for pid in descendants(self.process.pid) if _command(pid).startswith(title)]

    def loads(self) -> list[dict[str, Any]]:
        """Of all replicas of engines, in the order of their names."""
        return self.http.get("/v1/loads").json()["loads"]

    def actor(self, replica: str) -> int:
        """The process of the replica of that name: it has the log of that name open."""
        return next(pid for pid in self.actors("engine") if any(replica in name for name in _open_files(pid)))


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for child in _children(pid):
        found += [child, *descendants(child)]
    return found


def _children(pid: int) -> Iterator[int]:
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (task / "children").read_text().split())
    except OSError:
        return


def _open_files(pid: int) -> Iterator[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            yield os.readlink(entry)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _still_there(pids: list[int]) -> list[int]:
    """Those that have not ended after a while."""
    deadline = time.monotonic() + 60
    while True:
        left = [pid for pid in pids if _command(pid)]  # what has ended and was not waited for has none
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


if __name__ == "__main__":
    run(sys.argv[1])
