"""The agent's configuration: one TOML file, then the command line's flags over it.

Owns the settings, their defaults and the rules they obey. Reads one file and touches nothing
else: whether a directory or a certificate is there is for those to say who use it. The manual is
packaging/warmsync.toml.
"""

from __future__ import annotations

import posixpath
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, TypeAlias

from agent.address import parse_address, require_secure
from agent.errors import InvalidArgument
from agent.units import parse_rate

_WILDCARDS = frozenset("*?[")
_DEVICES = "/dev/"
_MAX_RUN_DIR = 70
"""The path of a Unix socket has 107 bytes (unix(7)); our names in there take 33."""
GROWABLE = ("ext4", "xfs", "btrfs")
"""What a resize can grow; "ext4" stands for ext2 and ext3 as well."""
_OPEN_TO_ALL = ("/dev/shm/", "/dev/mqueue/")
"""Directories under /dev in which anybody may make names."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files: this agent's certificate and key, and the authority's. All empty: no TLS."""

    cert: str = ""
    key: str = ""
    ca: str = ""

    @property
    def is_on(self) -> bool:
        """True if TLS is configured."""
        return bool(self.cert or self.key or self.ca)


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """How hard one migration works."""

    read_ahead_frames: int = 16
    threads: int = 4
    connections: int = 4
    data_port: int = 0
    checkpoint_bytes: int = 8 << 30


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What the agent takes on. A bandwidth of 0 is no limit; it holds for each migration."""

    max_migrations: int = 16
    max_watches: int = 256
    bandwidth_bytes_per_second: int = 0


@dataclass(frozen=True, slots=True)
class QemuConfig:
    """Which QEMUs the agent may talk to: patterns of QMP sockets, and of NBD servers' sockets."""

    sockets: tuple[str, ...] = ()
    nbd_sockets: tuple[str, ...] = ()
    run_dir: str = "/run/warmsync"


@dataclass(frozen=True, slots=True)
class ResizeConfig:
    """What may be grown on this host as a target, and how long each program for it may take."""

    file_systems: tuple[str, ...] = GROWABLE
    program_seconds: int = 600


@dataclass(frozen=True, slots=True)
class HooksConfig:
    """Commands (with their arguments) of this host that a cutover `auto` runs, and their limits.

    None: this host has no such hook. Never taken from a request.
    """

    quiesce: tuple[str, ...] = ()
    quiesce_seconds: float = 120.0
    boot: tuple[str, ...] = ()
    boot_seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """All settings of one agent."""

    listen: str = "127.0.0.1:7070"
    state_dir: str = "/var/lib/warmsync"
    bpffs_dir: str = "/sys/fs/bpf/warmsync"
    allow_devices: tuple[str, ...] = ()
    allow_cgroups: tuple[str, ...] = ()
    tls: TlsConfig = field(default_factory=TlsConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    qemu: QemuConfig = field(default_factory=QemuConfig)
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    hooks: HooksConfig = field(default_factory=HooksConfig)

    def merged(
        self,
        *,
        listen: str | None = None,
        state_dir: str | None = None,
        allow_devices: tuple[str, ...] = (),
        allow_cgroups: tuple[str, ...] = (),
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        insecure: bool = False,
    ) -> Self:
        """Return the settings with the command line's flags; None is a flag that was not given.

        `allow_devices` and `allow_cgroups` are added to the file's; `insecure` turns its TLS off.
        InvalidArgument (INVALID_CONFIG) if both TLS files and `insecure` are given, and whatever
        `validate` raises.
        """
        given = _given(cert=tls_cert, key=tls_key, ca=tls_ca)
        if insecure and given:
            message = "--insecure and TLS files contradict each other: give one or the other"
            raise InvalidArgument("INVALID_CONFIG", message, **given)
        config = replace(
            self,
            allow_devices=self.allow_devices + allow_devices,
            allow_cgroups=self.allow_cgroups + allow_cgroups,
            tls=TlsConfig() if insecure else replace(self.tls, **given),
            **_given(listen=listen, state_dir=state_dir),
        )
        validate(config)
        return config


def load(path: str | Path) -> AgentConfig:
    """Return the settings in a TOML file, checked.

    Raises InvalidArgument: CONFIG_UNREADABLE, INVALID_CONFIG, and what `validate` raises.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}): give a file that the agent may read"
        raise InvalidArgument("CONFIG_UNREADABLE", message, file=path) from error
    except ValueError as error:  # not TOML, or not even UTF-8
        message = f"{path} is not TOML ({error}): compare it with the example warmsync.toml"
        raise InvalidArgument("INVALID_CONFIG", message, file=path) from error
    try:
        config = AgentConfig(**_read(document, _KEYS))
        validate(config)
    except InvalidArgument as error:
        values = {**error.values, "file": str(path)}
        raise InvalidArgument(error.reason, f"{path}: {error}", **values) from error
    return config


def validate(config: AgentConfig) -> None:
    """Raise InvalidArgument if the settings contradict each other or can never work.

    Reasons: INVALID_CONFIG, BAD_ADDRESS, and INSECURE_ADDRESS for an address beyond this host
    without TLS.
    """
    tls = config.tls
    if tls.is_on and not (tls.cert and tls.key and tls.ca):
        missing = [item.name for item in fields(tls) if not getattr(tls, item.name)]
        raise _invalid(f"tls.{missing[0]}", "", "is missing: give cert, key and ca, or none")
    require_secure(parse_address(config.listen), tls=tls.is_on)
    if not config.state_dir:
        raise _invalid("state_dir", "", "is empty: name a directory")
    if not config.bpffs_dir.startswith("/"):
        raise _invalid("bpffs_dir", config.bpffs_dir, "is not absolute: start it with /")
    for key, patterns in (
        ("allow_devices", config.allow_devices),
        ("allow_cgroups", config.allow_cgroups),
        ("qemu.sockets", config.qemu.sockets),
        ("qemu.nbd_sockets", config.qemu.nbd_sockets),
    ):
        for pattern in patterns:
            _check_pattern(key, pattern)
    if not config.qemu.run_dir.startswith("/") or len(config.qemu.run_dir) > _MAX_RUN_DIR:
        mend = f"is not absolute, or longer than {_MAX_RUN_DIR}: sockets have short paths"
        raise _invalid("qemu.run_dir", config.qemu.run_dir, mend)
    _check_range("transfer.read_ahead_frames", config.transfer.read_ahead_frames, 1, 1024)
    _check_range("transfer.threads", config.transfer.threads, 1, 256)
    _check_range("transfer.connections", config.transfer.connections, 1, 64)
    _check_range("transfer.data_port", config.transfer.data_port, -1, 65535)
    _check_range("transfer.checkpoint_bytes", config.transfer.checkpoint_bytes, 1 << 20, 1 << 50)
    _check_file_systems(config.resize.file_systems)
    _check_range("resize.program_seconds", config.resize.program_seconds, 1, 86400)
    _check_range("limits.max_migrations", config.limits.max_migrations, 1, 1000)
    _check_range("limits.max_watches", config.limits.max_watches, 1, 10_000)
    _check_range("limits.bandwidth", config.limits.bandwidth_bytes_per_second, 0, (1 << 63) - 1)
    _check_hook("hooks.quiesce", config.hooks.quiesce, config.hooks.quiesce_seconds)
    _check_hook("hooks.boot", config.hooks.boot, config.hooks.boot_seconds)


def _check_file_systems(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in GROWABLE:
            mend = f"cannot be grown: use {', '.join(GROWABLE)}, or [] for none"
            raise _invalid("resize.file_systems", name, mend)


def is_allowed(given: str, resolved: str, patterns: tuple[str, ...]) -> bool:
    """Return whether the patterns allow a path; nothing is allowed without a pattern.

    `given`: the path as it was asked for and will be opened; `resolved`: the same with all
    symbolic links followed. A pattern allows what it names itself (`resolved` matches). Operators
    also name links such as /dev/vg/lv: the `given` path counts too, if it is absolute and normal
    (`..` after a link leads elsewhere than its text says), and if nobody but root can have made
    the link, which holds under /dev, or the pattern is that path to the letter. So a link that a
    tenant puts into a directory of images opens nothing.
    """
    if any(_matches(resolved, pattern) for pattern in patterns):
        return True
    if not given.startswith("/") or _normal(given) != given:
        return False
    if given in patterns and _WILDCARDS.isdisjoint(given):
        return True
    trusted = given.startswith(_DEVICES) and not given.startswith(_OPEN_TO_ALL)
    return trusted and any(_matches(given, pattern) for pattern in patterns)


def _matches(path: str, pattern: str) -> bool:
    """Match name by name, so that `*` does not cross a `/`."""
    names, wanted = path.split("/"), pattern.split("/")
    return len(names) == len(wanted) and all(map(fnmatchcase, names, wanted))


def _normal(path: str) -> str:
    # POSIX keeps two leading slashes apart; Linux does not.
    return posixpath.normpath("/" + path.lstrip("/"))


def _check_pattern(key: str, pattern: str) -> None:
    if not pattern.startswith("/"):
        raise _invalid(key, pattern, "is not absolute: start it with /")
    if "**" in pattern:
        mend = "has **, but no wildcard crosses a /: write one pattern for each depth"
        raise _invalid(key, pattern, mend)
    if _normal(pattern) != pattern or pattern == "/":
        mend = "matches no path: write it without '..', '.', '//' and a '/' at its end"
        raise _invalid(key, pattern, mend)


def _check_hook(key: str, command: tuple[str, ...], limit_seconds: float) -> None:
    if command and not command[0].startswith("/"):
        raise _invalid(key, command[0], "is not absolute: a command's path starts with /")
    if any("\0" in word for word in command):
        raise _invalid(key, command, "has a NUL in it: no command can be given one")
    if not 0 < limit_seconds <= 86400:
        raise _invalid(f"{key}_seconds", limit_seconds, "is out of range: above 0, up to 86400")


def _check_range(key: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise _invalid(key, value, f"is out of range: give {lowest} to {highest}")


Reader: TypeAlias = Callable[[str, object], Any]


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _invalid(key, value, 'is not a text: write it in quotes, as in "..."')
    return value


def _number(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid(key, value, "is not a whole number: write one, without quotes")
    return value


def _texts(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _invalid(key, value, 'is not a list of texts: write ["...", "..."]')
    return tuple(value)


def _seconds(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(key, value, "is not a number of seconds: write one, without quotes")
    return float(value)


def _rate(key: str, value: object) -> int:
    return parse_rate(value) if isinstance(value, str) else _number(key, value)


def _section(make: Callable[..., object], **keys: Reader) -> Reader:
    def read(key: str, value: object) -> object:
        if not isinstance(value, dict):
            raise _invalid(key, value, f"is not a section: write [{key}] and its keys below")
        return make(**_read(value, keys, f"{key}."))

    return read


def _limits(bandwidth: int = 0, **others: int) -> LimitsConfig:
    return LimitsConfig(bandwidth_bytes_per_second=bandwidth, **others)


_KEYS: Mapping[str, Reader] = {
    "listen": _text,
    "state_dir": _text,
    "bpffs_dir": _text,
    "allow_devices": _texts,
    "allow_cgroups": _texts,
    "tls": _section(TlsConfig, cert=_text, key=_text, ca=_text),
    "transfer": _section(
        TransferConfig,
        read_ahead_frames=_number,
        threads=_number,
        connections=_number,
        data_port=_number,
        checkpoint_bytes=_number,
    ),
    "qemu": _section(QemuConfig, sockets=_texts, nbd_sockets=_texts, run_dir=_text),
    "hooks": _section(
        HooksConfig,
        quiesce=_texts,
        quiesce_seconds=_seconds,
        boot=_texts,
        boot_seconds=_seconds,
    ),
    "limits": _section(_limits, max_migrations=_number, max_watches=_number, bandwidth=_rate),
    "resize": _section(ResizeConfig, file_systems=_texts, program_seconds=_number),
}


def _read(
    table: Mapping[str, object], keys: Mapping[str, Reader], prefix: str = ""
) -> dict[str, Any]:
    for key, value in table.items():
        if key not in keys:
            mend = f"is no setting: take it out, or use one of {', '.join(keys)}"
            raise _invalid(prefix + key, value, mend)
    return {key: keys[key](prefix + key, value) for key, value in table.items()}


def _given(**flags: str | None) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _invalid(key: str, value: object, mend: str) -> InvalidArgument:
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
    return InvalidArgument("INVALID_CONFIG", f"{key} = {shown} {mend}", key=key, value=shown)
