"""Cgroups: both kernel interfaces, what is refused, and who may be touched."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from agent.cgroup import V1_FILE, V2_FILE, open_cgroup
from agent.errors import FailedPrecondition, NotAllowed, NotFound, WarmsyncError
from tests.agent.fake_cgroups import FakeKernel, install, make, opened

DISK = "8:16"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return install(monkeypatch)


def refused(path: Path, *allowed: Path | str) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught:
        open_cgroup(str(path), tuple(map(str, allowed)))
    assert str(caught.value.values["path"]) in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("file", "line"), [(V1_FILE, "8:16 1048576"), (V2_FILE, "8:16 wbps=1048576")]
)
def test_a_limit_is_set_read_and_removed(
    tmp_path: Path, kernel: FakeKernel, file: str, line: str
) -> None:
    cgroup = open_cgroup(str(make(tmp_path / "vm", file)), (str(tmp_path / "*"),))
    assert cgroup.file == file
    assert cgroup.read(DISK) == 0
    cgroup.write(DISK, 1 << 20)
    cgroup.write("8:160", 5)
    assert kernel.written[0] == line
    assert (cgroup.read(DISK), cgroup.read("8:160"), cgroup.read("8:1")) == (1 << 20, 5, 0)
    cgroup.write(DISK, 0)
    assert (cgroup.read(DISK), cgroup.read("8:160")) == (0, 5)


def test_what_else_is_limited_stays(tmp_path: Path, kernel: FakeKernel) -> None:
    path = make(tmp_path / "vm", V2_FILE)
    (path / V2_FILE).write_text("8:16 rbps=7 wbps=max riops=8 wiops=9\n")
    cgroup = opened(path)
    assert cgroup.read(DISK) == 0
    cgroup.write(DISK, 100)
    assert (path / V2_FILE).read_text() == "8:16 rbps=7 wbps=100 riops=8 wiops=9\n"
    cgroup.write(DISK, 0)
    assert (path / V2_FILE).read_text() == "8:16 rbps=7 wbps=max riops=8 wiops=9\n"


def test_a_later_cgroup_of_the_same_name_is_another(tmp_path: Path, kernel: FakeKernel) -> None:
    cgroup = opened(make(tmp_path / "vm"))
    (tmp_path / "vm").rename(tmp_path / "old")
    make(tmp_path / "vm")
    for attempt in (lambda: cgroup.write(DISK, 1), lambda: cgroup.read(DISK)):
        with pytest.raises(FileNotFoundError):
            attempt()
    assert kernel.written == []


def test_what_is_not_allowed_is_not_even_looked_at(tmp_path: Path) -> None:
    path = make(tmp_path / "vm")
    for patterns in ((), (tmp_path / "other",), (tmp_path,), (path / "*",)):
        error = refused(path, *patterns)
        assert (type(error), error.reason) == (NotAllowed, "CGROUP_NOT_ALLOWED")
    assert refused(tmp_path / "absent").reason == "CGROUP_NOT_ALLOWED"


def test_patterns_match_the_real_path(tmp_path: Path) -> None:
    make(tmp_path / "vm")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "vm"
    link.symlink_to(tmp_path / "vm")
    assert refused(link, tmp_path / "links" / "*").reason == "CGROUP_NOT_ALLOWED"
    assert open_cgroup(str(link), (f"{tmp_path}/v*",)).path == str(tmp_path / "vm")


def test_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        error = refused(tmp_path / name, tmp_path / "*")
        assert (type(error), error.reason) == (NotFound, "CGROUP_NOT_FOUND")


def test_a_directory_that_is_no_cgroup_or_lacks_the_controller(tmp_path: Path) -> None:
    path = make(tmp_path / "vm", "io.stat")
    error = refused(path, path)
    assert (type(error), error.reason) == (FailedPrecondition, "CGROUP_UNSUITABLE")
    assert "subtree_control" in str(error)


@pytest.mark.parametrize("file", [V1_FILE, V2_FILE])
def test_one_in_which_nothing_runs(tmp_path: Path, file: str) -> None:
    path = make(tmp_path / "vm", file, populated=False)
    error = refused(path, path)
    assert (type(error), error.reason) == (FailedPrecondition, "CGROUP_EMPTY")


@pytest.mark.parametrize(
    ("number", "kind", "reason"),
    [
        (errno.EACCES, NotAllowed, "CGROUP_NOT_WRITABLE"),
        (errno.EROFS, NotAllowed, "CGROUP_NOT_WRITABLE"),
        (errno.EOPNOTSUPP, FailedPrecondition, "CGROUP_UNSUITABLE"),
    ],
)
def test_what_the_kernel_refuses_is_known_beforehand(
    tmp_path: Path, kernel: FakeKernel, number: int, kind: type[WarmsyncError], reason: str
) -> None:
    cgroup = opened(make(tmp_path / "vm"))
    cgroup.write(DISK, 70)
    cgroup.prove(DISK)
    assert kernel.written[-1] == "8:16 70"
    kernel.refuses[DISK] = number
    with pytest.raises(kind) as caught:
        cgroup.prove(DISK)
    assert caught.value.reason == reason
