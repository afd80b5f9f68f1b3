"""Configuration: the example, each refusal, flags over the file, and which paths are allowed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from agent.config import (
    AgentConfig,
    HooksConfig,
    LimitsConfig,
    QemuConfig,
    ResizeConfig,
    TlsConfig,
    TransferConfig,
    is_allowed,
    load,
    validate,
)
from agent.errors import InvalidArgument

EXAMPLE = Path(__file__).parents[2] / "packaging/warmsync.toml"

EVERYTHING = """
listen = "[::]:7171"
state_dir = "/srv/state"
bpffs_dir = "/run/bpf"
allow_devices = ["/dev/vg0/*", "/srv/images/*.raw"]
allow_cgroups = ["/sys/fs/cgroup/machine.slice/*"]
[tls]
cert = "c"
key = "k"
ca = "a"
[transfer]
read_ahead_frames = 2
threads = 1
[limits]
max_migrations = 3
max_watches = 7
bandwidth = "100M"
"""

# What is written, the reason, and what the message must name.
REFUSED = {
    "lisen = '127.0.0.1:1'": ("INVALID_CONFIG", "lisen = '127.0.0.1:1' is no setting"),
    "[limits]\nbandwith = 1": ("INVALID_CONFIG", "limits.bandwith = 1 is no setting"),
    "[limit]\nbandwidth = 1": ("INVALID_CONFIG", "limit = "),
    "listen = 7070": ("INVALID_CONFIG", "listen = 7070 is not a text"),
    "listen = '7070'": ("BAD_ADDRESS", "HOST:PORT"),
    "listen = '0.0.0.0:7070'": ("INSECURE_ADDRESS", "--tls-cert"),
    "listen = '10.0.0.1:7070'": ("INSECURE_ADDRESS", "loopback"),
    "listen = '[::]:7070'": ("INSECURE_ADDRESS", "loopback"),
    "listen = 'host.example:7070'": ("INSECURE_ADDRESS", "loopback"),
    "state_dir = ''": ("INVALID_CONFIG", "state_dir = '' is empty"),
    "bpffs_dir = 'bpf'": ("INVALID_CONFIG", "bpffs_dir = 'bpf' is not absolute"),
    "allow_devices = '/dev/sda'": ("INVALID_CONFIG", "is not a list"),
    "allow_devices = [1]": ("INVALID_CONFIG", "is not a list of texts"),
    "allow_devices = ['vd*']": ("INVALID_CONFIG", "'vd*' is not absolute"),
    "allow_devices = ['/dev/**']": ("INVALID_CONFIG", "one pattern for each depth"),
    "allow_devices = ['/dev/vg/../sda']": ("INVALID_CONFIG", "matches no path"),
    "allow_devices = ['/dev//sda']": ("INVALID_CONFIG", "matches no path"),
    "allow_devices = ['/dev/vg/']": ("INVALID_CONFIG", "matches no path"),
    "allow_devices = ['/']": ("INVALID_CONFIG", "matches no path"),
    "allow_devices = ['']": ("INVALID_CONFIG", "is not absolute"),
    "allow_cgroups = '/sys'": ("INVALID_CONFIG", "allow_cgroups = '/sys' is not a list"),
    "allow_cgroups = ['vm']": ("INVALID_CONFIG", "allow_cgroups = 'vm' is not absolute"),
    "tls = 1": ("INVALID_CONFIG", "tls = 1 is not a section"),
    "[tls]\ncert = 'c'": ("INVALID_CONFIG", "tls.key"),
    "[tls]\ncert = 'c'\nkey = 'k'": ("INVALID_CONFIG", "tls.ca"),
    "[tls]\ncert = true": ("INVALID_CONFIG", "tls.cert = True is not a text"),
    "[transfer]\nthreads = 0": ("INVALID_CONFIG", "transfer.threads = 0 is out of range"),
    "[transfer]\nthreads = true": ("INVALID_CONFIG", "is not a whole number"),
    "[transfer]\nthreads = 1.0": ("INVALID_CONFIG", "is not a whole number"),
    "[transfer]\nread_ahead_frames = 1025": ("INVALID_CONFIG", "give 1 to 1024"),
    "[limits]\nmax_migrations = 0": ("INVALID_CONFIG", "give 1 to 1000"),
    "[limits]\nmax_watches = 0": ("INVALID_CONFIG", "give 1 to 10000"),
    "[limits]\nbandwidth = '100 apples'": ("INVALID_RATE", "'100 apples' is not a rate"),
    "[limits]\nbandwidth = -1": ("INVALID_CONFIG", "limits.bandwidth = -1 is out of range"),
    "[limits]\nbandwidth = []": ("INVALID_CONFIG", "is not a whole number"),
    "listen = ": ("INVALID_CONFIG", "is not TOML"),
    "a = 1\na = 2": ("INVALID_CONFIG", "is not TOML"),
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_example_is_the_defaults() -> None:
    assert load(EXAMPLE) == AgentConfig()


def test_example_explains_every_setting() -> None:
    text = EXAMPLE.read_text()
    names = {field.name for field in dataclasses.fields(AgentConfig)}
    names -= {"transfer", "limits", "qemu", "resize", "hooks"}
    for kind in (
        TlsConfig,
        TransferConfig,
        LimitsConfig,
        QemuConfig,
        ResizeConfig,
        HooksConfig,
    ):
        names |= {
            field.name.removesuffix("_bytes_per_second") for field in dataclasses.fields(kind)
        }
    for name in names - {"key", "ca", "tls"}:
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if re.match(rf"{name} = ", line))
        assert lines[at - 1].startswith("#"), name


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == AgentConfig()


def test_every_key_is_read(tmp_path: Path) -> None:
    assert load(write(tmp_path, EVERYTHING)) == AgentConfig(
        listen="[::]:7171",
        state_dir="/srv/state",
        bpffs_dir="/run/bpf",
        allow_devices=("/dev/vg0/*", "/srv/images/*.raw"),
        allow_cgroups=("/sys/fs/cgroup/machine.slice/*",),
        tls=TlsConfig("c", "k", "a"),
        transfer=TransferConfig(2, 1),
        limits=LimitsConfig(3, 7, 100 << 20),
    )


@pytest.mark.parametrize("text", REFUSED)
def test_refused(tmp_path: Path, text: str) -> None:
    reason, words = REFUSED[text]
    path = write(tmp_path, text)
    with pytest.raises(InvalidArgument) as refusal:
        load(path)
    assert refusal.value.reason == reason
    assert words in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)
    assert refusal.value.values["file"] == str(path)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file") as missing:
        load(tmp_path / "absent.toml")
    assert missing.value.reason == "CONFIG_UNREADABLE"
    with pytest.raises(InvalidArgument, match="directory"):
        load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="is not TOML"):
        load(tmp_path / "binary")


@pytest.mark.parametrize("listen", ["localhost:0", "127.8.9.1:80", "[::1]:80", "unix:/run/w.sock"])
def test_without_tls_this_host_is_enough(listen: str) -> None:
    validate(AgentConfig(listen=listen))


def test_with_tls_every_address_will_do() -> None:
    validate(AgentConfig(listen="0.0.0.0:7070", tls=TlsConfig("c", "k", "a")))


def test_flags_go_over_the_file() -> None:
    file = AgentConfig(listen="127.0.0.1:1", allow_devices=("/dev/a",))
    flags = file.merged(listen="127.0.0.1:2", allow_devices=("/dev/b",), tls_cert=None)
    assert flags.listen == "127.0.0.1:2"
    assert flags.allow_devices == ("/dev/a", "/dev/b")
    assert flags.state_dir == file.state_dir
    both = AgentConfig(allow_cgroups=("/a",)).merged(allow_cgroups=("/b",))
    assert both.allow_cgroups == ("/a", "/b")
    assert AgentConfig().merged() == AgentConfig()


def test_flags_can_complete_the_tls_files() -> None:
    file = AgentConfig(tls=TlsConfig(cert="c", key="k", ca="a"))
    merged = file.merged(listen="0.0.0.0:1", tls_cert="other")
    assert merged.tls == TlsConfig("other", "k", "a")
    with pytest.raises(InvalidArgument, match=r"tls\.key"):
        AgentConfig().merged(tls_cert="c")


def test_insecure_turns_tls_off_and_the_rule_on() -> None:
    file = AgentConfig(listen="0.0.0.0:1", tls=TlsConfig("c", "k", "a"))
    assert file.merged(insecure=True, listen="127.0.0.1:1").tls == TlsConfig()
    with pytest.raises(InvalidArgument) as refusal:
        file.merged(insecure=True)
    assert refusal.value.reason == "INSECURE_ADDRESS"
    with pytest.raises(InvalidArgument, match="contradict"):
        file.merged(insecure=True, tls_cert="c")


PATTERNS = ("/dev/vg0/*", "/dev/nvme[0-9]n1", "/srv/images/*.raw", "/srv/links/web", "/dev/shm/*")

# Given path, resolved path, the verdict.
PATHS = [
    ("/dev/nvme0n1", "/dev/nvme0n1", True),
    ("/dev/nvme0n1p1", "/dev/nvme0n1p1", False),
    ("/dev/sda", "/dev/sda", False),
    # Links that udev makes are what operators write.
    ("/dev/vg0/web", "/dev/dm-3", True),
    ("/dev/dm-3", "/dev/dm-3", False),
    ("/dev/disk/by-id/x", "/dev/nvme1n1", True),
    ("/dev/vg0/deep/web", "/dev/dm-4", False),
    ("/dev/vg0", "/dev/vg0", False),
    # Text that is not what will be opened.
    ("/dev/vg0/../sda", "/dev/sda", False),
    ("/dev/vg0/..", "/dev", False),
    ("/dev/vg0/.", "/dev/dm-9", False),
    ("/dev//vg0/web", "/dev/dm-3", False),
    ("//dev/vg0/web", "/dev/dm-3", False),
    ("dev/vg0/web", "/dev/dm-3", False),
    ("/dev/vg0/web/", "/dev/dm-3", False),
    ("", "/dev/dm-3", False),
    # A normal detour to an allowed thing is no harm: what is opened is allowed.
    ("/dev/vg0/../nvme0n1", "/dev/nvme0n1", True),
    # Links that others may have made.
    ("/srv/images/a.raw", "/srv/images/a.raw", True),
    ("/srv/images/a.raw", "/dev/sda", False),
    ("/srv/images/sub/a.raw", "/srv/images/sub/a.raw", False),
    ("/srv/links/web", "/dev/sda", True),
    ("/dev/shm/a", "/dev/shm/a", True),
    ("/dev/shm/a", "/dev/sda", False),
    ("/srv/images/a.qcow2", "/srv/images/a.qcow2", False),
    ("/srv/images/A.RAW", "/srv/images/A.RAW", False),
    ("/srv/images/.raw", "/srv/images/.raw", True),
    ("/srv/images/a\n.raw", "/srv/images/a\n.raw", True),
    ("/srv/images/a.raw\n", "/srv/images/a.raw\n", False),
]


@pytest.mark.parametrize(("given", "resolved", "verdict"), PATHS)
def test_allowed(given: str, resolved: str, verdict: bool) -> None:
    assert is_allowed(given, resolved, PATTERNS) is verdict


@pytest.mark.parametrize(("given", "resolved", "verdict"), PATHS)
def test_nothing_is_allowed_by_default(given: str, resolved: str, verdict: bool) -> None:
    assert not is_allowed(given, resolved, AgentConfig().allow_devices)


def test_a_pattern_with_wildcards_is_not_a_name() -> None:
    assert is_allowed("/srv/[x]", "/srv/x", ("/srv/[x]",))
    assert not is_allowed("/srv/*", "/dev/sda", ("/srv/*",))
