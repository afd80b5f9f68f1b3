from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.daemon import claim_state_dir
from agent.errors import FailedPrecondition, NotAllowed

ROOT = Path(__file__).parents[2]


@contextmanager
def agent(state: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "agent", "agent", "--state-dir", str(state), *flags]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def listening(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    match = re.search(r"listening on (\S+)", process.stdout.readline())
    assert match is not None
    return match[1]


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent", *args], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_lives_and_ends(tmp_path: Path, number: signal.Signals) -> None:
    with agent(tmp_path / "state", "--listen", "127.0.0.1:0") as process:
        address = listening(process)
        done = command("list", "--json", "--agent", address)
        assert json.loads(done.stdout) == {"migrations": []}
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "no device is allowed" in err
        assert err.splitlines()[-1].endswith("stopped")
        assert "Traceback" not in err


def test_the_agents_key_is_made_once_and_said(tmp_path: Path) -> None:
    found = set()
    for _ in range(2):
        with agent(tmp_path, "--listen", "127.0.0.1:0") as process:
            doctor = command("doctor", "--json", "--agent", listening(process))
            process.terminate()
            _, err = process.communicate(timeout=30)
        checks = {one["name"]: one["finding"] for one in json.loads(doctor.stdout)["checks"]}
        found |= {*re.findall(r"identity key=(\S+)", err), checks["identity"].split(",")[0]}
    assert len(found) == 1
    assert found.pop().startswith("SHA256:")
    (tmp_path / "identity.pem").chmod(0o644)
    done = command("agent", "--state-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    assert "others than this agent may have its key" in done.stderr


def test_a_watcher_does_not_delay_the_end(tmp_path: Path) -> None:
    with agent(tmp_path, "--listen", "127.0.0.1:0") as process:
        host, _, port = listening(process).rpartition(":")
        with socket.create_connection((host, int(port))):  # connected, silent
            process.terminate()
            process.communicate(timeout=30)
        assert process.returncode == 0


def test_json_announcement_and_log(tmp_path: Path) -> None:
    with agent(tmp_path, "--listen", f"unix:{tmp_path}/s", "--json") as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said == {"event": "listening", "address": f"unix:{tmp_path}/s", "tls": False}
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert json.loads(err.splitlines()[0])["level"] == "warning"


def test_two_agents_do_not_share(tmp_path: Path) -> None:
    with agent(tmp_path, "--listen", "127.0.0.1:0") as process:
        address = listening(process)
        second = command("agent", "--state-dir", str(tmp_path), "--listen", "127.0.0.1:0")
        assert second.returncode == 1
        assert second.stderr.startswith("warmsync: error: another agent uses")
        third = command("agent", "--state-dir", f"{tmp_path}/other", "--listen", address)
        assert third.returncode == 1
        assert third.stderr.splitlines()[-1].startswith(f"warmsync: error: {address} is in use")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--listen", "0.0.0.0:0"], "TLS is off"),
        (["--listen", "nonsense"], "bad address"),
        (["--config", "/does/not/exist"], "cannot be read"),
        (["--tls-cert", "x"], "is missing"),
        (["--tls-cert", "/x", "--tls-key", "/x", "--tls-ca", "/x"], "cannot be read"),
        (["--state-dir", "/proc/nothing"], "choose another with --state-dir"),
    ],
)
def test_what_cannot_start_says_why(tmp_path: Path, flags: list[str], text: str) -> None:
    done = command("agent", "--state-dir", str(tmp_path), *flags)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("warmsync: error: ")
    assert text in line


def test_the_claim_to_a_state_directory(tmp_path: Path) -> None:
    path = tmp_path / "a/b"
    with claim_state_dir(path):
        with pytest.raises(FailedPrecondition, match="another agent"), claim_state_dir(path):
            pass
        assert path.stat().st_mode & 0o777 == 0o700
    with claim_state_dir(path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(NotAllowed, match="choose another"), claim_state_dir(tmp_path / "file"):
        pass
    with pytest.raises(BlockingIOError), claim_state_dir(path):
        raise BlockingIOError("of the body")
