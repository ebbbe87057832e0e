"""What a hostile disk, or another user of the host, would have root do while files are written into a folder."""

from __future__ import annotations

import os
import stat

import pytest

from hvmgr import errors
from hvmgr.storage import extraction
from hvmgr.storage.filesystems.reader import Node, Type


class Content:
    """A few bytes."""

    size = 4

    def pieces(self):
        yield 0, b"data"


def node(type=Type.FILE, **facts):
    known = {"mode": 0o666, "uid": os.geteuid(), "gid": os.getegid(), "links": 1, "modified": 1, "target": None}
    return Node(id=1, ref=None, type=type, size=4, **{**known, **facts})


@pytest.fixture
def target(tmp_path):
    with extraction.opened(tmp_path / "out") as opened:
        yield opened


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    yield path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def written(target, name):
    descriptor = target.file((name,), Content(), lambda _: None)
    assert descriptor is not None
    return descriptor


@pytest.mark.parametrize("replace", [os.link, os.symlink])
def test_file_whose_name_is_taken_meanwhile_keeps_what_is_its_own(target, victim, replace):
    descriptor = written(target, b"name")
    (target.path / "name").unlink()
    replace(victim, target.path / "name")
    target.settle((b"name",), node(), {}, descriptor)
    assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o666
    os.close(descriptor)


@pytest.mark.parametrize(
    ("type", "replace"),
    [
        (Type.PIPE, os.link),
        (Type.PIPE, os.symlink),
        (Type.FOLDER, os.link),
        (Type.FOLDER, os.symlink),
        (Type.LINK, os.link),
    ],
)
def test_pipe_folder_and_link_whose_names_are_taken_meanwhile_are_refused(target, victim, type, replace):
    if type is Type.PIPE:
        target.special((b"name",), node(type))
        (target.path / "name").unlink()
    replace(victim, target.path / "name")
    with pytest.raises((errors.Conflict, errors.UsageError)):
        target.settle((b"name",), node(type), {})


def test_pipe_has_its_mode_and_time(target):
    target.special((b"pipe",), node(Type.PIPE))
    target.settle((b"pipe",), node(Type.PIPE, mode=0o640, modified=5_000_000_000), {})
    facts = (target.path / "pipe").stat()
    assert (stat.S_IMODE(facts.st_mode), facts.st_mtime) == (0o640, 5)


@pytest.mark.parametrize("owner", [(1 << 32) - 1, 1 << 40])
def test_owner_that_cannot_be_given_has_no_rights_either(target, owner):
    """It would be a program of root's, with all its rights."""
    descriptor = written(target, b"name")
    capability = b"\1\0\0\2\0\4" + bytes(14)
    target.settle((b"name",), node(mode=0o6755, uid=owner), {"security.capability": capability}, descriptor)
    assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o755
    assert "security.capability" not in os.listxattr(descriptor)
    os.close(descriptor)
