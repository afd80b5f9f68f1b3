"""What this host can do for the agent, what it lacks, and the mend.

Checks only what the product uses. Looks and says; changes nothing on the host.
"""

from __future__ import annotations

import base64
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from agent.errors import WarmsyncError
from agent.resize.means import programs_missing
from agent.signer import read_signer

# bpf_loop() came with 5.17 (bpf-helpers(7)); the programs cannot mark long ranges without.
EBPF_KERNEL = (5, 17)
# Since 5.11 BPF memory is charged to the control group, not to RLIMIT_MEMLOCK.
MEMLOCK_FREE_KERNEL = (5, 11)
OPEN_FILES = 4096
CAP_SYS_ADMIN = 21
BPFFS = "/sys/fs/bpf"
_QMP_SECONDS = 1.0


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    """Works without, but slower or with less."""
    MISSING = "missing"
    """The agent cannot do its work."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the agent needs or can use; `mend` is empty where all is well."""

    name: str
    verdict: Verdict
    finding: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """Where to look: the running host, or a test's picture of one."""

    state_dir: Path
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    release: str = platform.release()
    dev: Path = Path("/dev")
    qmp_sockets: tuple[str, ...] = ()


def examine(host: Host) -> list[Check]:
    """Run all checks. Blocking: loads (and drops) the eBPF programs."""
    return [check(host) for check in CHECKS]


def check_kernel(host: Host) -> Check:
    """Look at the kernel's version."""
    if kernel_version(host.release) >= EBPF_KERNEL:
        return Check("kernel", Verdict.OK, host.release)
    mend = "boot a kernel of 5.17 or later for the ebpf tracker, or use --tracker scan"
    return Check("kernel", Verdict.WARNING, f"{host.release}: too old for the ebpf tracker", mend)


def check_btf(host: Host) -> Check:
    """Look for the kernel's own types, to which the eBPF programs are fitted."""
    path = host.sys / "kernel/btf/vmlinux"
    if path.exists():
        return Check("btf", Verdict.OK, str(path))
    mend = "boot a kernel built with CONFIG_DEBUG_INFO_BTF, or use --tracker scan"
    return Check("btf", Verdict.WARNING, f"{path} does not exist: no ebpf tracker", mend)


def check_privileges(host: Host) -> Check:
    """Look for root and CAP_SYS_ADMIN, which claims, fences and eBPF need."""
    status = (host.proc / "self/status").read_text()
    user = int(_field(status, "Uid").split()[1])
    capabilities = int(_field(status, "CapEff"), 16)
    if capabilities >> CAP_SYS_ADMIN & 1:
        return Check("privileges", Verdict.OK, f"uid {user} with CAP_SYS_ADMIN")
    finding = f"uid {user} without CAP_SYS_ADMIN: image files only, no ebpf tracker, no fence"
    return Check("privileges", Verdict.WARNING, finding, "run the agent as root")


def check_bpffs(host: Host) -> Check:
    """Look for the file system that keeps the tracker alive while no agent runs."""
    mounts = (host.proc / "self/mountinfo").read_text().splitlines()
    # mount point before the hyphen, type after it (proc_pid_mountinfo(5))
    if any(f" {BPFFS} " in line and " - bpf " in line for line in mounts):
        return Check("bpffs", Verdict.OK, f"mounted at {BPFFS}")
    finding = f"not mounted at {BPFFS}; the agent mounts it when it first needs it"
    return Check("bpffs", Verdict.WARNING, finding, f"mount -t bpf bpf {BPFFS}")


def check_ebpf(_host: Host) -> Check:
    """Load the eBPF programs, as the tracker would, without attaching them."""
    try:
        from native import ebpf
    except ImportError as error:
        mend = "install clang and libbpf-dev, then build again (make build)"
        return Check("ebpf", Verdict.WARNING, f"not part of this build ({error})", mend)
    obstacle = ebpf.check()
    if obstacle is None:
        return Check("ebpf", Verdict.OK, "programs load")
    mend = "see the checks kernel, btf and privileges, or use --tracker scan"
    return Check("ebpf", Verdict.WARNING, " ".join(obstacle.split()), mend)


def check_qemu(_host: Host) -> Check:
    """Look for what the qemu tracker needs."""
    try:
        from native import nbd
    except ImportError as error:
        mend = "install libnbd-dev, then build again (make build)"
        return Check("qemu", Verdict.WARNING, f"not part of this build ({error})", mend)
    tools = ("qemu-storage-daemon", "qemu-img")
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    if not lacking:
        return Check("qemu", Verdict.OK, f"libnbd ({nbd.version()}), {' and '.join(tools)}")
    finding = f"no {', no '.join(lacking)}: a disk whose QEMU has exited cannot be cut over"
    return Check("qemu", Verdict.WARNING, finding, "install qemu-utils")


def check_qmp(host: Host) -> Check:
    """Say hello to each QMP socket that the configuration names."""
    if not host.qmp_sockets:
        return Check("qmp", Verdict.OK, "no QMP sockets configured: no qemu tracker")
    from agent.qemu.access import Access
    from agent.qemu.monitor import find_silent

    access = Access(host.qmp_sockets, (), host.state_dir, "")
    sockets = access.find_sockets()
    silent = find_silent(sockets, _QMP_SECONDS)
    if not silent:
        return Check("qmp", Verdict.OK, f"{len(sockets)} QMP sockets answer")
    finding = f"{len(silent)} of {len(sockets)} QMP sockets do not answer, {silent[0]} among them"
    mend = "give the agent QMP sockets of its own; remove those that a QEMU has left behind"
    return Check("qmp", Verdict.WARNING, finding, mend)


def check_state_dir(host: Host) -> Check:
    """Try to make a file where the agent keeps its state."""
    parent = next(path for path in [host.state_dir, *host.state_dir.parents] if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        mend = "make it writable for the agent or choose another with --state-dir"
        return Check("state-dir", Verdict.MISSING, f"{host.state_dir}: {error.strerror}", mend)
    return Check("state-dir", Verdict.OK, f"{host.state_dir} is writable")


def check_identity(host: Host) -> Check:
    """Look at the key with which the agent signs certificates of cutovers; show its name."""
    try:
        signer = read_signer(host.state_dir)
    except WarmsyncError as error:
        mend = "as the finding says, then start the agent again"
        return Check("identity", Verdict.MISSING, str(error), mend)
    if signer is None:
        return Check("identity", Verdict.OK, "no key yet: the agent makes it at its first start")
    key = base64.b64encode(signer.public_key).decode()
    return Check("identity", Verdict.OK, f"{signer.fingerprint}, public key {key}")


def check_direct_io(host: Host) -> Check:
    """Try direct I/O where image files of tests and demos are likely to lie."""
    places = [path for path in (host.state_dir, Path(tempfile.gettempdir())) if path.is_dir()]
    refused = [str(path) for path in places if not _opens_directly(path)]
    if not refused:
        return Check("direct-io", Verdict.OK, f"works in {', '.join(map(str, places))}")
    mend = "keep image files on ext4, xfs or another file system that knows O_DIRECT"
    finding = f"refused in {', '.join(refused)}: image files there are copied through the cache"
    return Check("direct-io", Verdict.WARNING, finding, mend)


def check_open_files(_host: Host) -> Check:
    """Look at the limit on open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return Check("open-files", Verdict.OK, f"limit {_limit(soft)}")
    mend = f"ulimit -n {OPEN_FILES}, or LimitNOFILE={OPEN_FILES} in the systemd unit"
    return Check("open-files", Verdict.WARNING, f"limit {soft}: few migrations at once", mend)


def check_memory_lock(host: Host) -> Check:
    """Look at the limit on locked memory, which old kernels charge for eBPF maps."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if kernel_version(host.release) >= MEMLOCK_FREE_KERNEL or soft == resource.RLIM_INFINITY:
        return Check("memory-lock", Verdict.OK, f"limit {_limit(soft)}, enough on this kernel")
    mend = "ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit"
    return Check("memory-lock", Verdict.WARNING, f"limit {soft} bytes: too little for eBPF", mend)


def check_digests(_host: Host) -> Check:
    """Say which kernel computes digests on this CPU."""
    from native import chunk

    name = chunk.implementation()
    if name != "portable":
        return Check("digests", Verdict.OK, f"{name} kernel")
    finding = "portable kernel: scan and verify are slower"
    return Check("digests", Verdict.WARNING, finding, "use a CPU with AVX2; unset WARMSYNC_CPU")


def check_aes(host: Host) -> Check:
    """Look for AES instructions, without which TLS is slow."""
    text = (host.proc / "cpuinfo").read_text()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if flags and "aes" in flags[1].split():
        return Check("aes", Verdict.OK, "AES instructions, for TLS")
    finding = "no AES instructions: TLS costs more CPU"
    return Check("aes", Verdict.WARNING, finding, "let the hypervisor pass AES through")


def check_kernel_tls(host: Host) -> Check:
    """Look for TLS in the kernel (tls.rst of its documentation): one copy less of each byte."""
    available = host.proc / "sys/net/ipv4/tcp_available_ulp"
    if available.exists() and "tls" in available.read_text().split():
        return Check("kernel-tls", Verdict.OK, "the kernel encrypts data connections")
    finding = "not in this kernel, or not loaded: OpenSSL encrypts in the agent, which costs more"
    return Check("kernel-tls", Verdict.WARNING, finding, "modprobe tls, and start the agent again")


def check_io_uring(_host: Host) -> Check:
    """Make a ring, as data connections do: sysctl and seccomp both may forbid it."""
    from native import stream

    if stream.ring_works():
        return Check("io-uring", Verdict.OK, "scattered blocks are read many at once")
    finding = "refused: scattered blocks are read one by one, last rounds take longer"
    mend = "sysctl kernel.io_uring_disabled=0, or let the container's seccomp profile allow it"
    return Check("io-uring", Verdict.WARNING, finding, mend)


def check_huge_pages(host: Host) -> Check:
    """Look whether memory in huge pages is given to who asks for it (madvise(2))."""
    setting = host.sys / "kernel/mm/transparent_hugepage/enabled"
    if setting.exists() and "[never]" not in setting.read_text():
        return Check("huge-pages", Verdict.OK, "given to those who ask")
    finding = "not given: direct I/O pins many small pages, which costs more"
    return Check("huge-pages", Verdict.WARNING, finding, f"echo madvise > {setting}")


def check_resize(host: Host) -> Check:
    """Look for what grows file systems on larger targets."""
    lacks = {kind: names for kind, names in programs_missing().items() if names}
    if not (host.dev / "fuse").exists():
        mend = "modprobe fuse"
        return Check("resize", Verdict.WARNING, "no /dev/fuse: nothing can be grown", mend)
    if not lacks:
        return Check("resize", Verdict.OK, "ext4, xfs and btrfs can be grown")
    finding = "; ".join(f"no {', '.join(names)}: no {kind}" for kind, names in lacks.items())
    mend = "install e2fsprogs, xfsprogs, btrfs-progs, util-linux and mount, as far as they are used"
    return Check("resize", Verdict.WARNING, finding, mend)


CHECKS: tuple[Callable[[Host], Check], ...] = (
    check_kernel,
    check_btf,
    check_privileges,
    check_bpffs,
    check_ebpf,
    check_qemu,
    check_qmp,
    check_state_dir,
    check_identity,
    check_direct_io,
    check_open_files,
    check_memory_lock,
    check_digests,
    check_aes,
    check_kernel_tls,
    check_io_uring,
    check_huge_pages,
    check_resize,
)


def kernel_version(release: str) -> tuple[int, int]:
    """Return (major, minor) of a release such as "6.1.0-18-amd64"; (0, 0) if it has none."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _field(status: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(.*)$", status, re.MULTILINE)
    return match[1] if match else "0 0"


def _limit(soft: int) -> str:
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def _opens_directly(directory: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
