"""File systems on a device of their own: checked, and grown to its end.

Owns which program does that and how it is asked. Works on whatever device it is given; that nothing
of the guest's is lost when a program fails is for who gives it.

XFS and btrfs grow only while they are mounted. That is done in a mount namespace which ends with
the programs in it, so the host sees no mount and none is left. Mind that it lets the kernel read
what a guest has written; ext4 is never mounted.
"""

from __future__ import annotations

from pathlib import Path

from agent.layout.superblock import Content, Kind, damaged
from agent.resize.tool import ToolError, Tools, shorten

PROGRAMS = {
    Kind.EXT: ("e2fsck", "resize2fs"),
    Kind.XFS: ("xfs_repair", "xfs_growfs", "mount", "umount", "unshare"),
    Kind.BTRFS: ("btrfs", "mount", "umount", "unshare"),
}
"""What has to be installed, besides setpriv, mount and umount."""

# nouuid: the source's file system, or another copy, may be mounted on this host.
_OPTIONS = {Kind.XFS: "nouuid,nodev,nosuid,noexec,noatime"}
# nodiscard: what the guest has freed stays as it is.
_OPTIONS[Kind.BTRFS] = "nodiscard,nodev,nosuid,noexec,noatime"
_MOUNTED = 'mount -i -n -t "$1" -o "$2" "$3" "$4"; here=$4; shift 4; "$@"; umount -i -n "$here"'
_BTRFS = Path("/sys/fs/btrfs")


def check(tools: Tools, device: str, content: Content, point: Path) -> None:
    """Check a file system; what is in its journal comes first, if it was not unmounted.

    FailedPrecondition FILE_SYSTEM_DAMAGED, ToolError. `point` is a directory to mount on.
    """
    match content.kind:
        case Kind.EXT:
            _check_ext(tools, device, content)
        case Kind.XFS:
            _check_xfs(tools, device, content, point)
        case _:
            _judge(content, *tools.attempt("btrfs", "check", "--readonly", device))


def grow(tools: Tools, device: str, content: Content, point: Path) -> None:
    """Grow a file system that was checked to the end of its device. ToolError."""
    match content.kind:
        case Kind.EXT:
            # Forced: it asks for an e2fsck that writes; the one before has found it clean.
            tools.run("resize2fs", "-f", device)
        case Kind.XFS:
            _mounted(tools, device, content.kind, point, "xfs_growfs", "-d", str(point))
        case _:
            resize = ("btrfs", "filesystem", "resize", "max", str(point))
            _mounted(tools, device, content.kind, point, *resize)
            # Else the kernel goes on looking for it there.
            tools.attempt("btrfs", "device", "scan", "--forget", device)


def is_mounted(content: Content) -> bool:
    """Return whether a btrfs of this id is mounted here: the kernel takes one for the other."""
    return content.kind is Kind.BTRFS and (_BTRFS / content.uuid).exists()


def _check_ext(tools: Tools, device: str, content: Content) -> None:
    if content.needs_replay:
        # As each boot does: the journal, and what can be mended without a question.
        code, said = tools.attempt("e2fsck", "-f", "-p", device)
        _judge(content, 0 if code in (0, 1) else code, said)
    _judge(content, *tools.attempt("e2fsck", "-f", "-n", device))


def _check_xfs(tools: Tools, device: str, content: Content, point: Path) -> None:
    code, said = tools.attempt("xfs_repair", "-n", device)
    if code == 0:
        return
    try:
        # Perhaps only its log was not empty: a mount empties it.
        _mounted(tools, device, content.kind, point, "true")
    except ToolError:
        _judge(content, code, said)
    _judge(content, *tools.attempt("xfs_repair", "-n", device))


def _judge(content: Content, code: int, said: str) -> None:
    if code != 0:
        raise damaged(content.kind, content.start_bytes, shorten(said))


def _mounted(tools: Tools, device: str, kind: Kind, point: Path, *command: str) -> None:
    point.mkdir(mode=0o700, exist_ok=True)
    namespace = (
        "unshare",
        "--mount",
        "--propagation",
        "slave",  # what the host unmounts meanwhile must not stay mounted in there
        "--pid",
        "--fork",
        "--kill-child",
    )
    arguments = (kind.value, _OPTIONS[kind], device, str(point))
    tools.run(*namespace, "sh", "-euc", _MOUNTED, "sh", *arguments, *command)
