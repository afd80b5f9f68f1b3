"""Builds what Python alone cannot: gRPC stubs, the eBPF object and the Cython kernels.

Project metadata is in pyproject.toml. Set WARMSYNC_SANITIZE=1 for a build under AddressSanitizer
and UndefinedBehaviorSanitizer (the test suite does so).
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SANITIZE = os.environ.get("WARMSYNC_SANITIZE") == "1"
CHUNK = ["chunk_impl.c", "chunk_portable.c", "chunk_avx2.c", "chunk_avx512.c"]
BLOCKIO = ["blockio_impl.c", "blockio_salvage.c", "blockio_zero.c"]
BITMAP = ["bitmap_impl.c", "bitmap_runs.c"]
KERNELS = {
    "bitmap": [*BITMAP, *CHUNK],
    "chunk": CHUNK,
    "buffer": ["buffer_impl.c"],
    "blockio": ["blockio_open.c", "blockio_data.c", *BLOCKIO],
    "frame": ["frame_impl.c", "frame_check.c", "scan_impl.c", *BITMAP, *BLOCKIO, *CHUNK],
    "stream": [
        *(f"stream_{part}.c" for part in ("conn", "tls", "token", "pace", "pack", "memory")),
        "stream_send.c",
        "stream_receive.c",
        "blockio_ring.c",
        "frame_impl.c",
        "frame_check.c",
        "scan_impl.c",
        *BITMAP,
        *BLOCKIO,
        *CHUNK,
    ],
    "scan": ["scan_impl.c", *BITMAP, *BLOCKIO, *CHUNK],
    "nbd": ["nbd_impl.c", "nbd_wire.c", "nbd_status.c", *BITMAP],
}
C_FLAGS = ["-std=gnu11", "-O3", "-g1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
# Cython's own output, not ours, trips these.
C_FLAGS += ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-unused-function"]
LIBRARIES = {"ebpf": ["bpf"], "nbd": ["nbd"], "stream": ["ssl", "crypto", "uring", "zstd"]}
LINK_FLAGS: list[str] = []
if SANITIZE:
    C_FLAGS += ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    C_FLAGS += ["-fno-omit-frame-pointer"]
    LINK_FLAGS += ["-fsanitize=address,undefined"]


def has_ebpf_toolchain() -> bool:
    """True where clang and libbpf's headers are installed."""
    return shutil.which("clang") is not None and Path("/usr/include/bpf/libbpf.h").exists()


def extensions() -> list[Extension]:
    """Return the kernels that can be built here."""
    kernels = dict(KERNELS)
    if has_ebpf_toolchain():
        kernels["ebpf"] = ["ebpf_impl.c"]
    else:
        sys.stderr.write("warmsync: no clang or libbpf-dev: built without the ebpf tracker\n")
    if not Path("/usr/include/libnbd.h").exists():
        sys.stderr.write("warmsync: no libnbd-dev: built without the qemu tracker\n")
        del kernels["nbd"]
    return [
        Extension(
            f"native.{name}",
            [f"native/{name}.pyx", *(f"native/{source}" for source in sources)],
            include_dirs=["native"],
            extra_compile_args=C_FLAGS,
            extra_link_args=LINK_FLAGS,
            libraries=LIBRARIES.get(name, []),
            depends=[str(path) for path in ROOT.glob("native/*.[hp]*")],
        )
        for name, sources in kernels.items()
        if (ROOT / f"native/{name}.pyx").exists()
    ]


def generate_stubs() -> None:
    """Write warmsync.v1 next to its .proto files: messages, gRPC stubs and types for mypy."""
    protos = sorted(str(path) for path in ROOT.glob("protos/warmsync/v1/*.proto"))
    out = str(ROOT / "protos")
    includes = [ROOT / "protos", files("grpc_tools") / "_proto", files("google.rpc") / "../.."]
    command = [sys.executable, "-m", "grpc_tools.protoc", *(f"-I{path}" for path in includes)]
    command += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", *protos]
    subprocess.run(command, check=True)


def compile_bpf() -> None:
    """Compile dirty.bpf.c with BTF, so that libbpf can fit it to the running kernel."""
    source, target = ROOT / "native/dirty.bpf.c", ROOT / "native/dirty.bpf.o"
    if not source.exists() or not has_ebpf_toolchain():
        return
    machine = platform.machine()
    arch = {"x86_64": "x86", "aarch64": "arm64"}[machine]
    command = ["clang", "-g", "-O2", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror"]
    command += [f"-D__TARGET_ARCH_{arch}", f"-I/usr/include/{machine}-linux-gnu"]
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)


class BuildPy(build_py):
    """build_py, with the generated files made first."""

    def run(self) -> None:
        """Generate, then go on as usual."""
        generate_stubs()
        compile_bpf()
        super().run()


class BuildExt(build_ext):
    """build_ext, with the generated files made first.

    Never in parallel: extensions share C files, and would write the same objects at once.
    """

    def run(self) -> None:
        """Generate, then compile."""
        generate_stubs()
        compile_bpf()
        super().run()


setup(
    ext_modules=cythonize(
        extensions(),
        build_dir="build/sanitize" if SANITIZE else "build",
        compiler_directives={"language_level": "3", "freethreading_compatible": False},
        quiet=True,
    ),
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
)
