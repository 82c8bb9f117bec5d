"""Which servers run: said while they live, and `mooli ps` and `mooli stop`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mooli import cli
from mooli.server.running_servers import RunningServer, announced, running_servers
from mooli.shelf import command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "shared" / "servers"
    monkeypatch.setattr(command, "servers_folder", lambda: folder)
    return folder


def server(pid=1, **fields):
    return RunningServer(**{"pid": pid, "url": "http://127.0.0.1:3", "model": "m", "started_s": time.time(), **fields})


def test_a_server_is_known_while_it_says_so(folder):
    assert running_servers(folder) == []
    first, second = server(1), server(2, started_s=1.0)
    with announced(first, folder), announced(second, folder):
        assert running_servers(folder) == [second, first]
        assert folder.stat().st_mode & 0o077 == 0
    assert running_servers(folder) == []
    assert list(folder.iterdir()) == []


def test_a_server_that_was_killed_is_forgotten(folder):
    code = (
        "import sys, time, pathlib\n"
        "from mooli.server.running_servers import *\n"
        "with announced(RunningServer(7, 'u', 'm', 1.0), pathlib.Path(sys.argv[1])):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    assert [known.pid for known in running_servers(folder)] == [7]
    process.kill()
    process.wait(60)
    process.stdout.close()
    assert running_servers(folder) == []
    (left,) = folder.iterdir()
    os.utime(left, (1, 1))  # not one that is just coming
    assert running_servers(folder) == []
    assert list(folder.iterdir()) == []


def test_what_others_can_write_into_and_what_is_nonsense_is_not_believed(folder):
    with announced(server(), folder):
        folder.chmod(0o777)
        assert running_servers(folder) == []
        folder.chmod(0o700)
        (folder / "dir").mkdir()
        (folder / "link").symlink_to("/etc/passwd")
        (folder / "text").write_text("no JSON")
        assert len(running_servers(folder)) == 1


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with announced(server(), tmp_path / "file" / "servers"):
        assert running_servers(tmp_path / "file" / "servers") == []


def test_ps_and_stop_as_commands(folder, capsys, monkeypatch):
    assert cli.main(["ps"]) == 0
    assert "No server runs" in capsys.readouterr().err
    assert cli.main(["stop"]) == 2
    signals = []
    with announced(server(os.getpid(), model="one"), folder), announced(server(2**22 + 1, model="two"), folder):
        assert cli.main(["ps"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["MODEL", "one", "two"]
        assert cli.main(["ps", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert listed[0]["memory_bytes"] > 1e6 and listed[1]["memory_bytes"] == 0
        assert cli.main(["stop"]) == 2
        assert "which server? There are: one" in capsys.readouterr().err
        assert cli.main(["stop", "three"]) == 2
        monkeypatch.setattr(command.os, "kill", lambda pid, number: signals.append((pid, number)))
        assert cli.main(["stop", "two", "--wait", "0"]) == 1
        assert "two (pid 4194305) still answers" in capsys.readouterr().err
    assert signals == [(2**22 + 1, signal.SIGTERM)]


def test_a_server_of_several_models_is_known_by_each_of_them(folder, capsys, monkeypatch):
    signals = []
    monkeypatch.setattr(command.os, "kill", lambda pid, number: signals.append(pid))
    with announced(server(2**22 + 1, model="one, two"), folder), announced(server(2**22 + 2, model="three"), folder):
        assert running_servers(folder)[0].models in (["one", "two"], ["three"])
        for wanted in ("one", "two", "one, two"):
            assert cli.main(["stop", wanted, "--wait", "0"]) == 1
        assert cli.main(["stop", "on", "--wait", "0"]) == 2
    assert signals == [2**22 + 1] * 3
