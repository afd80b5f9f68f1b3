"""The native tests under AddressSanitizer and UndefinedBehaviorSanitizer.

A copy of the sources is built in build/sanitized and kept: it is built again only when a source has
changed. A copy, because a build also writes the gRPC stubs and the eBPF object beside their
sources, where an ordinary build may be at work at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = ROOT / "build" / "sanitized"
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "native",
    "agent",
    "protos",
    "tests",
)
LEFT_OUT = shutil.ignore_patterns(
    "*.so", "*.bpf.o", "*_pb2*", "__pycache__", "test_sanitizers.py", ".*"
)
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
REPORTS = ("AddressSanitizer:", "runtime error:", "UndefinedBehaviorSanitizer:")
# --capture=no: a report goes to the process's standard error, and the process ends at once.
PYTEST = ["-m", "pytest", "-q", "--capture=no", "-p", "no:cacheprovider", "tests/native"]

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build with sanitizers"),
]


def library(name: str) -> str:
    answer = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return str(Path(answer.stdout.strip()).resolve(strict=True))


def environment() -> dict[str, str]:
    asan = ":".join(
        [
            "detect_leaks=0",  # the interpreter frees little of what it holds when it exits
            "allocator_may_return_null=1",  # as malloc does: a size too large is a MemoryError
            "detect_stack_use_after_return=1",
        ]
    )
    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": asan,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # each bytes object gets its own guarded piece of memory
        "PYTHONPATH": f"{TREE}:{TREE / 'protos'}",
        "WARMSYNC_HYPOTHESIS": "quick",
        "WARMSYNC_SANITIZE": "1",
    }


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # They would take the time of other workers' tests, which wait for less.
    command = ["nice", "-n", "10", sys.executable, *arguments]
    return subprocess.run(command, cwd=TREE, env=environment(), capture_output=True, text=True)


def fingerprint() -> str:
    """What the build depends on: the sources, the compiler and the interpreter."""
    digest = hashlib.sha256(f"{library('libasan.so')} {sys.version}".encode())
    for path in sorted(
        [ROOT / "setup.py", *ROOT.glob("native/*.[chp]*"), *ROOT.glob("protos/**/*.proto")]
    ):
        if path.suffix != ".pyi":
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def copy_sources() -> None:
    for path in (TREE / "tests", TREE / "agent"):
        shutil.rmtree(path, ignore_errors=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, TREE / name, dirs_exist_ok=True, ignore=LEFT_OUT)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, TREE / name)


def build() -> None:
    shutil.rmtree(TREE / "native", ignore_errors=True)
    copy_sources()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=TREE,
        env={**os.environ, "WARMSYNC_SANITIZE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def _sanitized() -> Iterator[None]:
    """A sanitized build of the sources as they are now, ours alone while the tests run."""
    TREE.mkdir(parents=True, exist_ok=True)
    stamp = TREE / ".built"
    with (TREE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == fingerprint():
            copy_sources()
        else:
            stamp.unlink(missing_ok=True)
            build()
            stamp.write_text(fingerprint())
        yield


def kernels() -> list[Path]:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return sorted(TREE.glob(f"native/*{suffix}"))


def test_every_kernel_is_instrumented() -> None:
    names = {path.name.split(".")[0] for path in kernels()}
    assert names >= {"bitmap", "chunk", "buffer"}
    for path in kernels():
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        assert "__asan_report" in symbols, path
        assert "__ubsan_handle" in symbols, path


FAULTS = {
    "heap-buffer-overflow": "char *p = malloc(n); p[n] = 1; int r = p[0]; free(p); return r;",
    "heap-use-after-free": "char *p = malloc(n); free(p); return p[0];",
    "index 8 out of bounds": "volatile char b[8]; b[n] = 1; return b[0];",
    "shift exponent": "return 1 << (n * 8);",
    "signed integer overflow": "return 2147483647 - 7 + n;",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_sanitizers_report_a_fault_that_was_put_in(fault: str, tmp_path: Path) -> None:
    """Else a silent run would prove nothing."""
    source, target = tmp_path / "fault.c", tmp_path / "fault.so"
    source.write_text(f"#include <stdlib.h>\nint fault(int n) {{ {FAULTS[fault]} }}\n")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", *FLAGS, str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    answer = run("-c", f"import ctypes; ctypes.CDLL({str(target)!r}).fault(8)")
    assert answer.returncode != 0
    assert fault in answer.stderr
    assert any(report in answer.stderr for report in REPORTS)


def test_the_sanitizers_watch_our_buffers() -> None:
    """One byte behind an aligned buffer, although its size is not a multiple of anything."""
    code = "import ctypes; from native import buffer; b = buffer.AlignedBuffer(4097); "
    assert run("-c", code + "ctypes.memset(b.address, 0, 4097)").returncode == 0
    answer = run("-c", code + "ctypes.memset(b.address, 0, 4098)")
    assert answer.returncode != 0
    assert "heap-buffer-overflow" in answer.stderr


def test_the_native_tests_run_without_a_report() -> None:
    where = run("-c", "from native import bitmap; print(bitmap.__file__)")
    assert where.stdout.startswith(str(TREE)), where.stdout + where.stderr
    answer = run(*PYTEST)
    output = answer.stdout + answer.stderr
    assert answer.returncode == 0, output
    assert not [
        report for report in REPORTS if f"ERROR: {report}" in output or "runtime error:" in output
    ]
    assert " passed" in output
