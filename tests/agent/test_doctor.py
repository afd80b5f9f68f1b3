from __future__ import annotations

import builtins
import resource
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from agent import doctor
from agent.certificate import parse_key
from agent.doctor import Host, Verdict
from agent.signer import open_signer

STATUS = "Name:\tagent\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nCapEff:\t{caps:016x}\n"
MOUNTS = "22 27 0:21 / /proc rw - proc proc rw\n"
BPF_MOUNT = "30 23 0:30 / /sys/fs/bpf rw,relatime shared:9 - bpf bpf rw,mode=700\n"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host that has everything."""
    proc, system, state = tmp_path / "proc", tmp_path / "sys", tmp_path / "state"
    for directory in (proc / "self", system / "kernel/btf", state):
        directory.mkdir(parents=True)
    (proc / "self/status").write_text(STATUS.format(uid=0, caps=(1 << 41) - 1))
    (proc / "self/mountinfo").write_text(MOUNTS + BPF_MOUNT)
    (proc / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu aes avx2\n")
    (system / "kernel/btf/vmlinux").write_bytes(b"")
    for path, text in (
        (proc / "sys/net/ipv4/tcp_available_ulp", "espintcp mptcp tls\n"),
        (system / "kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return Host(state, proc, system, "6.1.0-18-amd64")


def test_all_checks_of_this_host(tmp_path: Path) -> None:
    checks = doctor.examine(Host(tmp_path))
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) == len(doctor.CHECKS)
    for check in checks:
        assert check.finding
        assert (check.mend == "") == (check.verdict is Verdict.OK), check


def test_the_key_is_shown_and_never_made(host: Host) -> None:
    check = doctor.check_identity(host)
    assert (check.verdict, "no key yet" in check.finding) == (Verdict.OK, True)
    assert list(host.state_dir.iterdir()) == []
    signer = open_signer(host.state_dir)
    check = doctor.check_identity(host)
    assert check.verdict is Verdict.OK
    shown, key = check.finding.split(", public key ")
    assert shown == signer.fingerprint
    assert parse_key(key) == shown
    (host.state_dir / "identity.pem").chmod(0o644)
    check = doctor.check_identity(host)
    assert (check.verdict, "chmod 600" in check.finding) == (Verdict.MISSING, True)


HEALTHY = [
    "kernel",
    "btf",
    "privileges",
    "bpffs",
    "state_dir",
    "memory_lock",
    "aes",
    "kernel_tls",
    "huge_pages",
]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_host_that_has_everything(host: Host, name: str) -> None:
    check = getattr(doctor, f"check_{name}")(host)
    assert check.verdict is Verdict.OK, check
    assert check.name == name.replace("_", "-")


def damage(host: Host, name: str) -> None:
    match name:
        case "btf":
            (host.sys / "kernel/btf/vmlinux").unlink()
        case "privileges":
            (host.proc / "self/status").write_text(STATUS.format(uid=1000, caps=1 << 20))
        case "bpffs":
            (host.proc / "self/mountinfo").write_text(MOUNTS)
        case "aes":
            (host.proc / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu aesx\n")
        case "kernel_tls":
            (host.proc / "sys/net/ipv4/tcp_available_ulp").write_text("mptcp\n")
        case "huge_pages":
            path = host.sys / "kernel/mm/transparent_hugepage/enabled"
            path.write_text("always madvise [never]\n")


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("btf", "CONFIG_DEBUG_INFO_BTF"),
        ("privileges", "as root"),
        ("bpffs", "mount -t bpf bpf /sys/fs/bpf"),
        ("aes", "hypervisor"),
        ("kernel_tls", "modprobe tls"),
        ("huge_pages", "echo madvise"),
    ],
)
def test_what_is_lacking_is_a_warning_with_its_mend(host: Host, name: str, mend: str) -> None:
    damage(host, name)
    check = getattr(doctor, f"check_{name}")(host)
    assert check.verdict is Verdict.WARNING
    assert mend in check.mend


def test_a_bpffs_elsewhere_does_not_count(host: Host) -> None:
    line = BPF_MOUNT.replace("/sys/fs/bpf ", "/mnt/other ")
    (host.proc / "self/mountinfo").write_text(MOUNTS + line)
    assert doctor.check_bpffs(host).verdict is Verdict.WARNING


@pytest.mark.parametrize(
    ("release", "verdict"),
    [("5.16.20", Verdict.WARNING), ("5.17.0-rc1", Verdict.OK), ("6.18.44", Verdict.OK)],
)
def test_kernel_versions(host: Host, release: str, verdict: Verdict) -> None:
    assert doctor.check_kernel(Host(host.state_dir, release=release)).verdict is verdict
    assert doctor.kernel_version("strange") == (0, 0)


def test_memory_lock_matters_to_old_kernels_only(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    old = Host(host.state_dir, release="5.10.0")
    assert doctor.check_memory_lock(old).verdict is Verdict.WARNING
    assert doctor.check_memory_lock(host).verdict is Verdict.OK
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert doctor.check_memory_lock(old).verdict is Verdict.OK
    assert doctor.check_open_files(host).verdict is Verdict.OK


def test_few_open_files(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    check = doctor.check_open_files(host)
    assert check.verdict is Verdict.WARNING
    assert "LimitNOFILE" in check.mend


def test_a_build_without_ebpf_says_how_to_build(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name == "native" and args[2] and "ebpf" in args[2]:
            raise ImportError("no module named native.ebpf")
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    check = doctor.check_ebpf(host)
    assert check.verdict is Verdict.WARNING
    assert "libbpf-dev" in check.mend


@pytest.mark.parametrize(("answer", "verdict"), [(None, Verdict.OK), ("EPERM", Verdict.WARNING)])
def test_ebpf_programs(
    host: Host, monkeypatch: pytest.MonkeyPatch, answer: str | None, verdict: Verdict
) -> None:
    fake = types.ModuleType("native.ebpf")
    fake.check = lambda: answer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "native.ebpf", fake)
    monkeypatch.setattr("native.ebpf", fake, raising=False)
    check = doctor.check_ebpf(host)
    assert check.verdict is verdict
    assert answer is None or answer in check.finding


def test_a_state_directory_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    check = doctor.check_state_dir(Host(blocked / "state"))
    assert check.verdict is Verdict.MISSING
    assert "--state-dir" in check.mend
    assert doctor.check_state_dir(Host(tmp_path / "not/yet/made")).verdict is Verdict.OK


def test_direct_io_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_direct_io(host).name == "direct-io"
    monkeypatch.setattr(doctor, "_opens_directly", lambda _: False)
    check = doctor.check_direct_io(host)
    assert check.verdict is Verdict.WARNING
    assert str(host.state_dir) in check.finding


def test_the_portable_kernel_is_a_warning(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from native import chunk

    monkeypatch.setattr(chunk, "implementation", lambda: "portable")
    assert doctor.check_digests(host).verdict is Verdict.WARNING
    monkeypatch.setattr(chunk, "implementation", lambda: "avx2")
    assert doctor.check_digests(host).verdict is Verdict.OK


def test_a_host_without_io_uring(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from native import stream

    monkeypatch.setattr(stream, "ring_works", lambda: False)
    check = doctor.check_io_uring(host)
    assert check.verdict is Verdict.WARNING
    assert "io_uring_disabled" in check.mend


def test_what_a_resize_lacks(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.layout.superblock import Kind

    (tmp_path / "fuse").touch()
    here = Host(host.state_dir, dev=tmp_path)
    monkeypatch.setattr(doctor, "programs_missing", lambda: {Kind.EXT: [], Kind.XFS: []})
    assert doctor.check_resize(here).verdict is Verdict.OK
    lacks = {Kind.EXT: [], Kind.XFS: ["xfs_growfs"]}
    monkeypatch.setattr(doctor, "programs_missing", lambda: lacks)
    check = doctor.check_resize(here)
    assert check.verdict is Verdict.WARNING
    assert check.finding == "no xfs_growfs: no xfs"
    assert "xfsprogs" in check.mend
    (tmp_path / "fuse").unlink()
    assert "modprobe fuse" in doctor.check_resize(here).mend
