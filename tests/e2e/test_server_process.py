"""The server's two processes: how they start, what happens when one of them dies, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server_process import PATIENCE_S, ServerProcess, Stream, needs_demo, needs_proc, wait_until

from mooli.server.launch import READY_LINE

pytestmark = [needs_demo, needs_proc]

STORY = "Once upon a time there was a radish"
DEATH_S = 5
"""In which the server is to end when its engine has."""
SLACK_S = 10
"""For a machine that does other things as well."""

RECORD_IMPORTS = """
import atexit, os, sys

@atexit.register
def write():
    with open(os.path.join(os.environ["RECORD_IMPORTS_IN"], str(os.getpid())), "w") as file:
        file.write("\\n".join(sys.modules))
"""


ONE_BY_ONE = ("--speculative-algorithm", "none")
"""Of servers whose streams must last: guessing would shorten them."""


def story(max_new_tokens: int, **fields: object) -> dict[str, object]:
    params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return {"text": STORY, "sampling_params": params, **fields}


def open_streams(server: ServerProcess, max_tokens: int) -> dict[str, Stream]:
    """One of each API, by path."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "Write a long story about a king and his castle."}]}
    endless = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    bodies = {
        "/generate": story(max_tokens),
        "/v1/completions": {"model": "m", "prompt": STORY, **endless},
        "/v1/chat/completions": {**chat, **endless},
        "/v1/messages": {**chat, "max_tokens": max_tokens, "temperature": 0.0},
    }
    return {path: server.stream(path, body) for path, body in bodies.items()}


@pytest.fixture(scope="module")
def shared() -> Iterator[ServerProcess]:
    """For tests that do the server no harm."""
    with ServerProcess(*ONE_BY_ONE) as server:
        yield server


# -- the engine ends first ---------------------------------------------------------------------------------------------
def test_when_the_engine_is_killed_everybody_hears_of_it_and_the_server_ends():
    with ServerProcess(*ONE_BY_ONE) as server, ThreadPoolExecutor(1) as waiting:
        streams = open_streams(server, 700)
        whole = waiting.submit(httpx.post, f"{server.url}/generate", json=story(700), timeout=PATIENCE_S)
        wait_until(lambda: server.load()["num_running_reqs"] == 5, "all five run")
        os.kill(server.engine_pid, signal.SIGKILL)
        status = wait_until(lambda: (found := server.http.get("/health").status_code) != 200 and found, "not healthy")
        assert status == 503
        refused = server.http.post("/generate", json=story(1))
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert server.exit_status(DEATH_S + SLACK_S) == 1
        for path, stream in streams.items():
            last = [event for event in stream.events() if "error" in event]
            assert len(last) == 1, path
            assert "SIGKILL" in last[0]["error"]["message"]
            assert stream.text.endswith("}}\n\n" if path == "/v1/messages" else "data: [DONE]\n\n")
        answer = whole.result()
        assert answer.status_code == 503
        assert "SIGKILL" in answer.json()["message"]
        assert "SIGKILL" in server.log
        assert "Traceback" not in server.log


def test_a_hung_engine_is_killed():
    with ServerProcess(*ONE_BY_ONE, "--watchdog-timeout", "3") as server:
        stream = server.stream("/generate", story(3000))
        os.kill(server.engine_pid, signal.SIGSTOP)
        assert server.exit_status() == 1
        message = stream.events()[-1]["error"]["message"]
        assert "gave no sign for 3 s" in message
        assert "memory" not in message
        assert "no sign for 3 s" in server.log
        assert "out of memory" not in server.log


# -- the server ends first ---------------------------------------------------------------------------------------------
def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones():
    with ServerProcess(*ONE_BY_ONE, "--shutdown-timeout", str(PATIENCE_S)) as server:
        stream = server.stream("/generate", story(900))
        assert server.http.get("/health/ready").status_code == 200
        server.signal(signal.SIGTERM)
        wait_until(lambda: server.http.get("/health/ready").status_code == 503, "not ready")
        for path, body in (
            ("/generate", story(1)),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/messages", {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}),
        ):
            refused = server.http.post(path, json=body)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert "shutting down" in refused.json()["error"]["message"]
        assert server.http.get("/health/live").status_code == 200
        assert not stream.is_over
        last = stream.events()[-1]["meta_info"]
        assert (last["finish_reason"], last["completion_tokens"]) == ({"type": "length", "length": 900}, 900)
        assert stream.text.endswith("data: [DONE]\n\n")
        assert server.exit_status() == 0
        assert "Traceback" not in server.log


@pytest.mark.parametrize(("timeout", "num_signals"), [("1", 1), (str(PATIENCE_S), 2)], ids=["timeout", "again"])
def test_what_is_not_finished_in_time_ends_as_aborted(timeout, num_signals):
    with ServerProcess(*ONE_BY_ONE, "--shutdown-timeout", timeout) as server:
        streams = open_streams(server, 900)
        server.signal(signal.SIGTERM)
        if num_signals == 2:
            wait_until(lambda: server.http.get("/health/ready").status_code == 503, "not ready")
            server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        ends = {path: stream.finish() for path, stream in streams.items()}
        finish = streams["/generate"].events()[-1]["meta_info"]["finish_reason"]
        assert finish["type"] == "abort"
        assert "shutting down" in finish["message"]
        for path, text in ends.items():
            assert text.endswith('{"type":"message_stop"}\n\n' if path == "/v1/messages" else "data: [DONE]\n\n") or (
                '"error"' in text
            ), text[-300:]
        assert "Traceback" not in server.log


def test_sigterm_waits_for_a_request_whose_body_is_still_arriving():
    with ServerProcess(*ONE_BY_ONE, "--shutdown-timeout", str(PATIENCE_S)) as server:
        body = json.dumps(story(20)).encode()
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += "Expect: 100-continue\r\n"
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            assert b" 100 Continue" in client.recv(1000)  # the request is taken
            client.sendall(body[:20])
            server.signal(signal.SIGTERM)
            wait_until(lambda: server.http.get("/health/ready").status_code == 503, "not ready")
            client.sendall(body[20:])
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 200 ") and b'"completion_tokens":20' in answer
        assert server.exit_status() == 0
        assert "shutting down: requests that have 120 s to finish: " in server.log and "Traceback" not in server.log


def test_the_log_of_an_idle_server_says_that_it_was_asked_to_end():
    with ServerProcess() as server:
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        assert server.lines[-1].endswith("shutting down: no request is being answered")


def test_ctrl_c_in_a_terminal_reaches_both_processes_and_drains():
    with ServerProcess(*ONE_BY_ONE, "--shutdown-timeout", str(PATIENCE_S)) as server:
        stream = server.stream("/generate", story(100))
        os.killpg(server.pid, signal.SIGINT)
        assert stream.events()[-1]["meta_info"]["completion_tokens"] == 100
        assert server.exit_status() == 0
        assert "Traceback" not in server.log


def test_the_engine_ends_with_the_server_and_the_port_is_free_at_once():
    with ServerProcess() as first:
        engine_pid = first.engine_pid
        stream = first.stream("/generate", story(3000))
        first.signal(signal.SIGKILL)
        first.exit_status()
        wait_until(lambda: not is_running(engine_pid), "the engine process has ended")
        with pytest.raises(httpx.TransportError):
            stream.finish()
    with ServerProcess(port=first.port) as second:
        assert second.port == first.port
        assert second.generate(STORY)["meta_info"]["completion_tokens"] == 8


def test_a_server_can_be_started_again_where_one_has_just_drained():
    with ServerProcess() as first:
        first.generate(STORY)
        first.signal(signal.SIGTERM)
        assert first.exit_status() == 0
    with ServerProcess(port=first.port) as second:
        assert second.http.get("/health").status_code == 200


def is_running(pid: int) -> bool:
    """A process that nobody has waited for yet has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- it does not start -------------------------------------------------------------------------------------------------
def test_a_port_in_use_is_said_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = ServerProcess(port=port)
        assert server.exit_status() == 2
    assert len(server.lines) == 1
    assert re.match(rf"mooli: error: cannot listen on 127\.0\.0\.1:{port}: .*--port", server.lines[0])


@pytest.mark.parametrize(
    ("flags", "model", "says"),
    [((), "no/such-model", "no/such-model"), (("--context-length", "1000000"), "demo", "8192 positions")],
)
def test_what_cannot_be_served_is_one_line(flags, model, says):
    server = ServerProcess("--log-level", "error", *flags, model=model)
    assert server.exit_status() == 2
    (line,) = server.lines
    assert line.startswith("mooli: error: ")
    assert says in line


def test_a_signal_while_the_model_is_loaded_ends_the_start():
    server = ServerProcess()
    wait_until(lambda: "Loading" in server.log or server.process.poll() is not None, "it loads")
    server.signal(signal.SIGTERM)
    assert server.exit_status() == 0
    assert "Traceback" not in server.log


# -- what the processes are --------------------------------------------------------------------------------------------
def test_each_process_imports_its_own_side_only(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(RECORD_IMPORTS)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with ServerProcess(env={"PYTHONPATH": path, "RECORD_IMPORTS_IN": str(tmp_path)}) as server:
        server.generate(STORY)
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        pids = {"server": server.pid, "engine": server.engine_pid}
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
    assert "mooli/_native" not in maps
    imported = {name: set((tmp_path / str(pid)).read_text().split()) for name, pid in pids.items()}
    http = {"starlette", "uvicorn", "aiohttp", "httptools", "fastapi", "prometheus_client"}
    assert not imported["engine"] & (http | {"mooli.server", "mooli.frontend.engine", "jinja2"})
    computing = {"mooli._native", "mooli.runner.model_runner", "mooli.models.loader", "mooli.scheduler.scheduler"}
    assert not imported["server"] & (computing | {"torch"})
    # and the record is one: what each needs is there
    assert computing <= imported["engine"]
    assert {"starlette", "uvicorn", "mooli.server.launch"} <= imported["server"]


def test_only_the_http_port_is_listened_on(shared):
    sockets = {
        os.readlink(link) for pid in (shared.pid, shared.engine_pid) for link in Path(f"/proc/{pid}/fd").iterdir()
    }
    listening = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{shared.pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening[name] = fields[1]
    assert listening == {"tcp": f"0100007F:{shared.port:04X}" if sys.byteorder == "little" else listening["tcp"]}
    for line in Path(f"/proc/{shared.pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if f"socket:[{fields[6]}]" in sockets:
            assert not int(fields[3], 16) & 0x10000, line
            assert len(fields) == 7, f"this socket has a name: {line}"


# -- what the machine is short of --------------------------------------------------------------------------------------
def test_with_few_file_descriptors_clients_wait_and_are_all_served():
    with ServerProcess(num_files=64) as server, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)) for _ in range(200)
        ]
        wait_until(lambda: "new connections wait" in server.log, "the server has said that it is full")
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answers = [b"".join(iter(lambda client=client: client.recv(1 << 16), b"")) for client in clients]
        assert {answer[:13] for answer in answers} == {b"HTTP/1.1 200 "}
        assert server.generate(STORY)["meta_info"]["completion_tokens"] == 8
        assert server.log.count("new connections wait") < 10
        assert "Traceback" not in server.log


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "stopped"])
def test_a_log_that_nobody_reads_holds_up_nothing(is_gone):
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "mooli.launch_server", "--model-path", "demo", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max-total-tokens", "4096", "--log-requests"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=write_end, start_new_session=True,
    )  # fmt: skip
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb", buffering=0) as log:
            said = b""
            while READY_LINE.encode() not in said:
                piece = log.read(1 << 16)
                assert piece, said
                said += piece
            url = re.search(rb"listening on (\S+)", said)[1].decode()
            if is_gone:
                log.close()
            else:
                fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 4096)
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
                for _ in range(200):
                    assert http.get("/health").status_code == 200
                assert http.post("/generate", json=story(2)).status_code == 200
                if not is_gone:
                    log.read(1 << 16)
                    assert http.get("/health").status_code == 200
                    assert b"lines of the log could not be written" in log.read(1 << 16)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# -- clients -----------------------------------------------------------------------------------------------------------
def test_the_log_says_where_and_when_it_is_ready(shared):
    assert re.search(r"listening on http://127\.0\.0\.1:\d+\n.*The server is fired up and ready to roll!", shared.log)


def test_a_client_that_leaves_frees_its_request_and_the_cache_keeps_it(shared):
    text = "A radish that nobody has asked for before grows in the garden of the king and"
    stream = shared.stream("/generate", {**story(3000), "text": text})
    assert shared.load()["num_running_reqs"] == 1
    stream.leave()
    load = wait_until(lambda: not (found := shared.load())["num_running_reqs"] and found, "nothing runs")
    assert load["num_used_tokens"] == load["num_waiting_reqs"] == 0
    meta = shared.generate(text)["meta_info"]
    assert meta["cached_tokens"] == meta["prompt_tokens"] - 1


def test_a_client_that_does_not_read_holds_up_nobody(shared):
    slow = socket.socket()
    with slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.settimeout(PATIENCE_S)
        slow.connect(("127.0.0.1", shared.port))
        asked = story(256, stream=True, return_logprob=True)
        asked["sampling_params"]["n"] = 16  # each growing: more than the sockets hold
        body = json.dumps(asked).encode()
        head = ["POST /generate HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", ""]
        slow.sendall("\r\n".join(head).encode() + body)
        assert shared.generate(STORY, max_new_tokens=64)["meta_info"]["completion_tokens"] == 64
        wait_until(lambda: not shared.load()["num_running_reqs"], "the engine is done with both")
        received = b"".join(iter(lambda: slow.recv(1 << 20), b""))
    events = received.count(b"data: {")
    assert b'"completion_tokens":256' in received
    assert b"data: [DONE]\n\n" in received
    assert events < 16 * 200, "the connection took everything: nothing was shown"


def test_256_streams_at_a_time_complete(shared):
    async def read(client: httpx.AsyncClient, number: int) -> dict:
        body = story(4, stream=True)
        async with client.stream("POST", f"{shared.url}/generate", json={**body, "text": f"{number} and"}) as answer:
            text = await answer.aread()
        assert text.endswith(b"data: [DONE]\n\n")
        return json.loads(text.split(b"\n\n")[-3][6:])["meta_info"]

    async def run() -> list[dict]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=PATIENCE_S) as client:
            return await asyncio.gather(*(read(client, number) for number in range(256)))

    ends = asyncio.run(run())
    assert {(meta["finish_reason"]["type"], meta["completion_tokens"]) for meta in ends} == {("length", 4)}
    assert len({meta["id"] for meta in ends}) == 256
    assert shared.load()["num_used_tokens"] == 0
