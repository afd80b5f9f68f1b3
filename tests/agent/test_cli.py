from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service

from agent.cli import cli
from agent.cli.types import parse_volume
from agent.errors import InvalidArgument
from agent.view import describe, page
from tests.agent.fake_agent import FakeAgent, failed, pretending
from tests.agent.messages import migration

ROOT = Path(__file__).parents[2]
CONTRACT = "id state rounds bytes_sent bytes_total predicted_downtime_seconds downtime_seconds"
COMMANDS = (
    *("agent", "migrate", "cutover", "list", "show", "watch", "pause", "resume", "cancel"),
    *("rollback", "finish", "settle", "verify", "doctor", "update", "delete", "devices"),
    *("completion", "power-down"),
)
GROUPS = {"certificate": ("show", "verify")}
PATHS = [*((name,) for name in COMMANDS), *((g, name) for g in GROUPS for name in GROUPS[g])]


@pytest.fixture(scope="module")
def serving() -> Iterator[FakeAgent]:
    with pretending() as fake:
        yield fake


@pytest.fixture
def fake(serving: FakeAgent) -> FakeAgent:
    """The module's one server, as good as new."""
    address, hanging = serving.address, serving.hanging
    serving.__init__()  # type: ignore[misc]
    serving.address, serving.hanging = address, hanging
    return serving


def invoke(*args: str, agent: FakeAgent | None = None) -> Result:
    where = ["--agent", agent.address] if agent else []
    return CliRunner().invoke(cli, [*args, *where], prog_name="warmsync")


def answer(*args: str, agent: FakeAgent, code: int = 0) -> Any:
    """Run with --json; return the one object that stdout must hold."""
    result = invoke(*args, "--json", agent=agent)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


MIGRATE = ("migrate", "--peer", "10.0.0.2:7070", "--volume", "/dev/a:/dev/b")


def test_the_commands_of_the_contract_are_there() -> None:
    assert set(cli.commands) == {*COMMANDS, *GROUPS}
    for name, commands in GROUPS.items():
        group = cli.commands[name]
        assert isinstance(group, click.Group)
        assert set(group.commands) == set(commands)


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_command_has_help_and_json(path: tuple[str, ...]) -> None:
    result = invoke(*path, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: warmsync {' '.join(path)}")
    assert "--json" in result.stdout
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    undocumented = [
        option.name
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert undocumented == []


def test_the_list_of_commands_is_readable() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "..." not in result.stdout.replace("[ARGS]...", "")
    assert invoke("--version").exit_code == 0


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("show",),
        ("show", "a/b"),
        ("show", "x", "--agent", "nowhere"),
        ("show", "x", "--agent", "10.0.0.1:7070"),
        ("show", "x", "--tls-cert", "only.pem"),
        ("show", "x", "--tls-cert", "a", "--tls-key", "b", "--tls-ca", "/does/not/exist"),
        ("show", "x", "--insecure", "--tls-cert", "a", "--tls-key", "b", "--tls-ca", "c"),
        ("migrate", "--peer", "h:1"),
        (*MIGRATE, "--volume", "/dev/a"),
        (*MIGRATE, "--tracker", "magic"),
        (*MIGRATE, "--max-downtime", "500"),
        (*MIGRATE, "--max-downtime", "0"),
        (*MIGRATE, "--block-size", "0"),
        (*MIGRATE, "--bandwidth-limit", "-1"),
        (*MIGRATE, "--timeout", "1s"),
        (*MIGRATE, "--guest-cgroup", "/vm"),
        (*MIGRATE, "--guest-least-rate", "1M"),
        (*MIGRATE, "--guest-cgroup", "vm", "--guest-least-rate", "1M"),
        (*MIGRATE, "--guest-cgroup", "/vm", "--guest-least-rate", "0"),
        ("update", "x"),
        ("completion", "tcsh"),
    ],
)
def test_usage_errors_exit_with_2(args: tuple[str, ...]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    if args:
        assert result.stderr.startswith("warmsync: error: ")
        assert len(result.stderr.splitlines()) == 1


def test_usage_errors_are_json_if_wanted() -> None:
    result = invoke("show", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["reason"] == "USAGE"


@pytest.mark.parametrize(
    "args", [("list",), ("show", "x"), ("watch", "x"), ("verify", "x"), ("devices",), MIGRATE]
)
def test_nobody_there(args: tuple[str, ...]) -> None:
    result = invoke(*args, "--agent", "127.0.0.1:1", "--insecure", "--json")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("warmsync: error: cannot reach 127.0.0.1:1 ")
    error = json.loads(result.stdout)["error"]
    assert error["reason"] == "PEER_UNREACHABLE"
    assert error["values"]["address"] == "127.0.0.1:1"


def test_the_agent_may_come_from_the_environment(
    fake: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMSYNC_AGENT", fake.address)
    assert "web1" in invoke("show", "web1").stdout


def test_errors_of_the_agent(fake: FakeAgent) -> None:
    result = invoke("show", "other", agent=fake)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "warmsync: error: migrations/other is unknown\n"
    error = answer("show", "other", agent=fake, code=1)["error"]
    assert error == {
        "reason": "MIGRATION_NOT_FOUND",
        "message": "migrations/other is unknown",
        "values": {"name": "migrations/other"},
    }


def test_migrate_sends_what_was_asked_for(fake: FakeAgent) -> None:
    options = ["--id", "web7", "--tracker", "scan", "--max-downtime", "250ms", "--volume"]
    options += ["/img/c:/img/d", "--bandwidth-limit", "10M", "--block-size", "64K"]
    options += ["--guest-cgroup", "/sys/fs/cgroup/vm", "--guest-least-rate", "4M"]
    shown = answer(*MIGRATE, *options, agent=fake)
    assert (shown["id"], shown["state"]) == ("web7", "PENDING")
    (request,) = fake.requests
    assert request.migration_id == "web7"
    asked = request.migration
    assert asked.peer == "10.0.0.2:7070"
    volumes = [(volume.source, volume.target) for volume in asked.volumes]
    assert volumes == [("/dev/a", "/dev/b"), ("/img/c", "/img/d")]
    assert asked.tracker == pb.TRACKER_SCAN
    assert asked.max_downtime_seconds == 0.25
    assert asked.bandwidth_limit_bytes_per_second == 10 << 20
    assert asked.block_size_bytes == 64 << 10
    throttle = pb.GuestThrottle(cgroup="/sys/fs/cgroup/vm", least_bytes_per_second=4 << 20)
    assert asked.guest_throttle == throttle


def test_migrate_leaves_defaults_to_the_agent(fake: FakeAgent) -> None:
    result = invoke(*MIGRATE, agent=fake)
    assert result.exit_code == 0
    assert result.stdout.startswith("chosen started; migration chosen goes on")
    asked = fake.requests[0].migration
    assert (asked.HasField("max_downtime_seconds"), asked.block_size_bytes) == (False, 0)
    assert asked.tracker == pb.TRACKER_AUTO
    assert not asked.HasField("guest_throttle")


def test_migrate_waits_until_converged(fake: FakeAgent) -> None:
    fake.watched = [migration(), migration(rounds=4, state=pb.STATE_CONVERGED)]
    fake.hang = True
    result = invoke(*MIGRATE, "--wait", "converged", "--timeout", "1h", "--json", agent=fake)
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert set(CONTRACT.split()) <= set(shown)
    assert (shown["state"], shown["rounds"]) == ("CONVERGED", 4)
    assert "web1 SYNCING, round 3" in result.stderr  # progress goes elsewhere
    result = invoke(*MIGRATE, "--wait", "converged", agent=fake)
    assert "warmsync cutover web1" in result.stdout


def test_convergence_that_was_skipped_counts(fake: FakeAgent) -> None:
    fake.watched = [migration(state=pb.STATE_CUT_OVER)]
    assert answer(*MIGRATE, "--wait", "converged", agent=fake)["state"] == "CUT_OVER"


def test_migrate_tells_of_a_failure(fake: FakeAgent) -> None:
    fake.watched, fake.hang = [migration(), failed()], True
    result = invoke(*MIGRATE, "--wait", "converged", "--json", agent=fake)
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert (shown["state"], shown["error"]["reason"]) == ("FAILED", "SOURCE_IO_ERROR")
    assert shown["last_refusal"]["reason"] == "WAS_REFUSED"
    last = result.stderr.splitlines()[-1]
    assert last == "warmsync: error: source /dev/x: check the disk"


def test_migrate_tells_of_a_cancel(fake: FakeAgent) -> None:
    fake.watched = [migration(state=pb.STATE_CANCELLED)]
    shown = answer(*MIGRATE, "--wait", "converged", agent=fake, code=1)
    assert shown["error"]["reason"] == "MIGRATION_CANCELLED"


def test_a_watch_that_ends_too_early_is_a_failure(fake: FakeAgent) -> None:
    fake.watched = [migration()]
    shown = answer(*MIGRATE, "--wait", "converged", agent=fake, code=1)
    assert shown["error"]["reason"] == "WATCH_ENDED"


def test_migrate_gives_up_waiting(fake: FakeAgent) -> None:
    fake.watched, fake.hang = [migration()], True
    result = invoke(*MIGRATE, "--wait", "converged", "--timeout", "2s", "--json", agent=fake)
    assert result.exit_code == 3
    shown = json.loads(result.stdout)
    assert (shown["state"], shown["error"]["reason"]) == ("SYNCING", "TIMED_OUT")
    assert "migration web1 goes on" in result.stderr


@pytest.mark.parametrize("args", [(*MIGRATE, "--wait", "converged"), ("watch", "web1")])
def test_ctrl_c_leaves_the_migration_alone(fake: FakeAgent, args: tuple[str, ...]) -> None:
    fake.watched, fake.hang = [migration()], True
    fake.hanging.clear()
    command = [sys.executable, "-m", "agent", *args, "--agent", fake.address]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert fake.hanging.wait(30)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "goes on: see `warmsync watch" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_reader_that_goes_away(fake: FakeAgent) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "agent", "list", "--agent", fake.address]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=30
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_cutover(fake: FakeAgent) -> None:
    shown = answer("cutover", "web1", agent=fake, code=1)
    assert shown["error"]["reason"] == "NOT_CONVERGED"
    shown = answer("cutover", "web1", "--force", agent=fake)
    assert set(CONTRACT.split()) <= set(shown)
    assert (shown["state"], shown["downtime_seconds"]) == ("CUT_OVER", 0.25)
    assert shown["downtime_parts"]["send_seconds"] == 0.125
    assert [request.force for request in fake.requests] == [False, True]
    assert "downtime 250 ms" in invoke("cutover", "web1", "--force", agent=fake).stdout


def test_list_asks_for_all_pages(fake: FakeAgent) -> None:
    shown = answer("list", agent=fake)
    assert [item["id"] for item in shown["migrations"]] == ["a", "b"]
    assert [request.page_token for request in fake.requests] == ["", "second"]
    lines = invoke("list", agent=fake).stdout.splitlines()
    assert lines[0].split() == (
        ["ID", "ROLE", "STATE", "PEER", "ROUNDS", "SENT", "SIZE", "DIRTY", "DOWNTIME"]
    )
    assert lines[1].startswith("a    source   SYNCING")
    assert lines[2].startswith("b    source   FAILED ")
    assert lines[1].endswith("~180 ms")


def test_show(fake: FakeAgent) -> None:
    shown = answer("show", "migrations/web1", agent=fake)
    assert set(CONTRACT.split()) <= set(shown)
    assert shown["volumes"] == [
        {
            "source": "/dev/a",
            "target": "/dev/b",
            "size_bytes": 2 << 30,
            "block_size_bytes": 4096,
            "cut_bytes": 0,
        }
    ]
    assert (shown["tracker"], shown["carrier"], shown["role"]) == ("ebpf", "grpc", "source")
    assert (shown["downtime_seconds"], shown["downtime_parts"], shown["error"]) == (None,) * 3
    assert shown["history"] == [{"state": "PENDING", "time": "2023-11-14T22:13:20Z"}]
    assert shown["update_time"] is None
    text = invoke("show", "web1", agent=fake).stdout
    for part in ("/dev/a -> /dev/b (2.0 GiB", "ebpf (block devices)", "~180 ms (budget 500 ms)"):
        assert part in text


def test_a_throttled_guest_is_shown() -> None:
    message = migration(guest_limit_bytes_per_second=8 << 20)
    assert describe(message)["guest_throttle"] is None
    message.guest_throttle.CopyFrom(
        pb.GuestThrottle(cgroup="/sys/fs/cgroup/vm", least_bytes_per_second=4 << 20)
    )
    shown = describe(message)
    assert shown["guest_limit_bytes_per_second"] == 8 << 20
    assert shown["guest_throttle"] == {
        "cgroup": "/sys/fs/cgroup/vm",
        "least_bytes_per_second": 4 << 20,
    }
    text = page(message)
    assert "/sys/fs/cgroup/vm, never below 4.0 MiB/s" in text
    assert "throttled: may write 8.0 MiB/s to each disk" in text


def test_watch(fake: FakeAgent) -> None:
    fake.watched = [migration(), migration(state=pb.STATE_COMPLETED)]
    result = invoke("watch", "web1", "--json", agent=fake)
    assert result.exit_code == 0
    states = [json.loads(text)["state"] for text in result.stdout.splitlines()]
    assert states == ["SYNCING", "COMPLETED"]
    assert "COMPLETED" in invoke("watch", "web1", agent=fake).stdout
    fake.watched = [failed()]
    result = invoke("watch", "web1", "--json", agent=fake)
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["error"]["reason"] == "SOURCE_IO_ERROR"


@pytest.mark.parametrize(
    ("command", "state"),
    [
        ("pause", "PAUSED"),
        ("resume", "SYNCING"),
        ("cancel", "CANCELLED"),
        ("rollback", "ROLLED_BACK"),
        ("finish", "COMPLETED"),
    ],
)
def test_changes(fake: FakeAgent, command: str, state: str) -> None:
    assert answer(command, "web1", agent=fake)["state"] == state
    assert invoke(command, "web1", agent=fake).stdout == f"web1 {state}\n"


@pytest.mark.parametrize(("owner", "state"), [("source", "ROLLED_BACK"), ("target", "COMPLETED")])
def test_settle(fake: FakeAgent, owner: str, state: str) -> None:
    assert answer("settle", "web1", "--owner", owner, agent=fake)["state"] == state
    assert invoke("settle", "web1", "--owner", owner, agent=fake).stdout == f"web1 {state}\n"


def test_settle_needs_to_be_told_who_owns(fake: FakeAgent) -> None:
    assert invoke("settle", "web1", agent=fake).exit_code == 2
    assert invoke("settle", "web1", "--owner", "nobody", agent=fake).exit_code == 2
    assert fake.requests == []


def test_update_names_only_what_was_given(fake: FakeAgent) -> None:
    answer("update", "web1", "--bandwidth-limit", "0", agent=fake)
    answer("update", "web1", "--max-downtime", "2s", agent=fake)
    masks = [list(request.update_mask.paths) for request in fake.requests]
    assert masks == [["bandwidth_limit_bytes_per_second"], ["max_downtime_seconds"]]
    assert fake.requests[1].migration.max_downtime_seconds == 2.0


def test_delete(fake: FakeAgent) -> None:
    assert answer("delete", "web1", agent=fake) == {"id": "web1", "deleted": True}


def compared(**numbers: Any) -> Any:
    return service.VerifyMigrationResponse(compared_bytes=100, total_bytes=100, **numbers)


def test_verify(fake: FakeAgent) -> None:
    fake.compared = [compared(done=True)]
    assert answer("verify", "web1", agent=fake)["equal"] is True
    assert "equal" in invoke("verify", "web1", agent=fake).stdout
    fake.compared = [compared(done=True, pending_bytes=5)]
    assert answer("verify", "web1", agent=fake)["equal"] is False
    assert "will be sent" in invoke("verify", "web1", agent=fake).stdout


def test_verify_fails_if_the_copies_differ(fake: FakeAgent) -> None:
    where = service.Mismatch(source="/dev/a", offset_bytes=4096, length_bytes=7)
    fake.compared = [compared(done=True, mismatched_bytes=7, mismatches=[where])]
    shown = answer("verify", "web1", agent=fake, code=1)
    assert shown["equal"] is False
    assert shown["mismatches"] == [{"source": "/dev/a", "offset_bytes": 4096, "length_bytes": 7}]
    assert shown["error"]["reason"] == "COPIES_DIFFER"
    assert "do not use the target" in invoke("verify", "web1", agent=fake).stderr


def test_verify_fails_if_the_source_cannot_be_read(fake: FakeAgent) -> None:
    where = service.UnreadRange(source="/dev/a", offset_bytes=65536, length_bytes=65536)
    fake.compared = [compared(done=True, unread_bytes=65536, unread=[where])]
    shown = answer("verify", "web1", agent=fake, code=1)
    assert (shown["equal"], shown["unread_bytes"]) == (False, 65536)
    assert shown["unread"] == [{"source": "/dev/a", "offset_bytes": 65536, "length_bytes": 65536}]
    assert shown["error"]["reason"] == "COMPARISON_INCOMPLETE"
    assert shown["error"]["values"] == {
        "path": "/dev/a",
        "offset_bytes": "65536",
        "unread_bytes": "65536",
    }
    said = invoke("verify", "web1", agent=fake).stderr
    assert "at offset 65536 of /dev/a" in said
    # What differs is worse than what is not known.
    fake.compared[0].mismatched_bytes = 7
    assert answer("verify", "web1", agent=fake, code=1)["error"]["reason"] == "COPIES_DIFFER"


@pytest.mark.parametrize("messages", [[], [compared()]])
def test_a_comparison_without_a_result_is_no_success(fake: FakeAgent, messages: Any) -> None:
    fake.compared = messages
    shown = answer("verify", "web1", agent=fake, code=1)
    assert (shown["equal"], shown["error"]["reason"]) == (False, "VERIFY_ENDED")


def test_devices(fake: FakeAgent) -> None:
    (device,) = answer("devices", agent=fake)["devices"]
    assert device["path"] == "/dev/vg/web1"
    assert device["logical_block_size_bytes"] == 512
    assert "1.0 GiB" in invoke("devices", agent=fake).stdout


def test_doctor_here(tmp_path: Path) -> None:
    result = invoke("doctor", "--json", "--state-dir", str(tmp_path))
    assert result.exit_code == 0
    checks = json.loads(result.stdout)["checks"]
    assert "kernel" in [check["name"] for check in checks]
    assert "kernel" in invoke("doctor", "--state-dir", str(tmp_path)).stdout


def test_doctor_there(fake: FakeAgent) -> None:
    shown = answer("doctor", agent=fake, code=1)
    assert shown["checks"][0]["status"] == "missing"
    assert shown["error"]["reason"] == "HOST_LACKS"
    assert "mend: buy one" in invoke("doctor", agent=fake).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = invoke("completion", shell)
    assert result.exit_code == 0
    assert "_WARMSYNC_COMPLETE" in result.stdout
    assert json.loads(invoke("completion", shell, "--json").stdout)["shell"] == shell


def test_completion_completes() -> None:
    environment = {"_WARMSYNC_COMPLETE": "bash_complete", "COMP_WORDS": "warmsync ro"}
    result = CliRunner(env={**environment, "COMP_CWORD": "1"}).invoke(
        cli, [], prog_name="warmsync", complete_var="_WARMSYNC_COMPLETE"
    )
    assert result.stdout == "plain,rollback\n"


def test_a_unix_socket(tmp_path: Path) -> None:
    with pretending(f"unix:{tmp_path}/agent.sock") as fake:
        assert answer("show", "web1", agent=fake)["id"] == "web1"


def test_states_of_newer_agents_are_shown_as_numbers(fake: FakeAgent) -> None:
    newer = migration()
    newer.state = 99  # type: ignore[assignment]
    fake.watched = [newer]
    result = invoke("watch", "web1", "--json", agent=fake)
    assert json.loads(result.stdout)["state"] == "99"


@pytest.mark.parametrize(
    ("text", "source", "target"),
    [
        ("/dev/a:/dev/b", "/dev/a", "/dev/b"),
        ("/dev/disk/by-path/pci-0000:00:1f.2:/x", "/dev/disk/by-path/pci-0000:00:1f.2", "/x"),
    ],
)
def test_volumes(text: str, source: str, target: str) -> None:
    volume = parse_volume(text)
    assert (volume.source, volume.target) == (source, target)


@pytest.mark.parametrize("text", ["", "/a", "a:/b", "/a:b", "/a:/b:/c", ":/b"])
def test_bad_volumes(text: str) -> None:
    with pytest.raises(InvalidArgument, match="SRC:DST"):
        parse_volume(text)
