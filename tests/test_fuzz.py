"""Fuzzes what strangers send and what stands on a disk: four fuzzers at the same time.

WARMSYNC_FUZZ_SECONDS says for how long. A failure names its inputs: they belong into the corpus.
The frame decoder and the greeting are C, under AddressSanitizer; the readers of the journal and of
certificates are Python, of whose memory a sanitizer has nothing to say.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from native import frame
from tests.fuzz import certificate_fuzz, journal_fuzz

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests/fuzz/corpus"
SECONDS = int(os.environ.get("WARMSYNC_FUZZ_SECONDS", "60"))
NATIVE = {
    "frame": "frame_impl frame_check blockio_impl blockio_zero chunk_impl chunk_portable "
    "chunk_avx2 chunk_avx512",
    "greeting": "stream_conn stream_tls stream_token stream_pace",
}
NAMES = (*NATIVE, "journal", "certificate")
NICE = ["nice", "-n", "10"]
"""They would take the time of other workers' tests, which wait for less."""
COMPILER = ["clang", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-D_GNU_SOURCE"]
COMPILER += ["-fno-sanitize-recover=undefined", "-I", str(ROOT / "native")]
LIBRARIES = ["-lssl", "-lcrypto", "-lpthread"]
# An input that takes minutes hangs; on a busy machine one waited 17 s for its turn.
HANGS_SECONDS = 300
OPTIONS = [f"-max_total_time={SECONDS}", f"-timeout={HANGS_SECONDS}", "-print_final_stats=1"]
# Else a whole record goes as soon as a smaller one takes the same branches, and its fields with it.
OPTIONS.append("-keep_seed=1")
LONGEST_BYTES = {"frame": 16384, "greeting": 16384, "journal": 8192, "certificate": 8192}

pytestmark = pytest.mark.timeout(SECONDS + HANGS_SECONDS + 300)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def running(directory: Path) -> Iterator[dict[str, subprocess.Popen[bytes] | str]]:
    """Start all; a text in place of a process says why it is not there."""
    commands = {name: command(name, directory) for name in NAMES}
    # In memory, as each input is a database of its own, which is synced.
    with TemporaryDirectory(dir="/dev/shm", prefix="warmsync-fuzz-") as memory:
        found = {
            name: made if isinstance(made, str) else start(name, made, directory, memory)
            for name, made in commands.items()
        }
        yield found
        for process in found.values():
            if not isinstance(process, str):
                process.kill()
                process.wait()


def command(name: str, directory: Path) -> list[str] | str:
    """Return how a fuzzer is started, built before; or why it cannot be."""
    if name not in NATIVE:
        if importlib.util.find_spec("atheris") is None:
            return "no atheris for this machine"
        return [sys.executable, "-m", "tests.fuzz.run", name]
    if shutil.which("clang") is None:
        return "no clang installed"
    program = str(directory / f"{name}_fuzz")
    sources = [str(ROOT / f"native/{one}.c") for one in NATIVE[name].split()]
    line = [*COMPILER, str(ROOT / f"tests/fuzz/{name}_fuzz.c"), *sources, "-o", program]
    built = subprocess.run([*line, *LIBRARIES], capture_output=True, text=True)
    if "fuzzer" in built.stderr and "cannot find" in built.stderr:
        return "clang without libFuzzer (libclang-rt-dev)"
    assert built.returncode == 0, built.stderr
    return [program]


def start(name: str, line: list[str], directory: Path, memory: str) -> subprocess.Popen[bytes]:
    found = directory / name
    found.mkdir()
    line += [str(found), str(CORPUS / name), f"-artifact_prefix={directory}/{name}-", *OPTIONS]
    line.append(f"-max_len={LONGEST_BYTES[name]}")
    with (directory / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*NICE, *line], stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "TMPDIR": memory}
        )


@pytest.mark.parametrize("name", NAMES)
def test_whatever_comes_is_survived(
    name: str, running: dict[str, subprocess.Popen[bytes] | str], directory: Path
) -> None:
    process = running[name]
    if isinstance(process, str):
        pytest.skip(process)
    code = process.wait(SECONDS + HANGS_SECONDS + 120)  # a hang is told, with its input, by then
    log = (directory / f"{name}.log").read_text(errors="replace")
    inputs = [
        f"{path.name}: {base64.b64encode(path.read_bytes()).decode()}"
        for path in directory.glob(f"{name}-*")
    ]
    assert code == 0, "\n".join((log[-6000:], "inputs in base64:", *inputs))
    assert "DONE   cov:" in log, log[-2000:]
    print(log[log.rindex("DONE   cov:") :])


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in (CORPUS / name).iterdir()]


def test_the_corpus_holds_what_is_whole() -> None:
    """A change of a format makes the corpus stale: each input would end at the first check."""
    frames = 0
    for data in corpus("frame"):
        with suppress(frame.FrameError):
            frames += bool(frame.inspect(data[1:]))
    assert frames
    assert any(data[1:5] == b"WSH1" for data in corpus("greeting"))
    held = [certificate_fuzz.survive(data) for data in corpus("certificate")]
    depths = {one.statement.depth for one in held if one is not None}
    assert depths == set(certificate_fuzz.WHOLE)
    whole = {data[0] % 5 for data in corpus("journal") if data and journal_fuzz.survive(data)}
    assert whole == set(range(5))
