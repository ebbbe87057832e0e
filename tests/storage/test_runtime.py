"""The folder of a user for what is in clear meanwhile: never one that another user put there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvmgr import settings
from hvmgr.storage import runtime


@pytest.fixture
def shared(tmp_path, monkeypatch, require):
    """A folder as shared memory is, and a user who has nothing else; where his folder is to be."""
    require(os.geteuid() == 0, "only root can give folders away")
    monkeypatch.delenv("HVMGR_RUN", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(settings, "is_root", lambda: False)
    folder = tmp_path / "shm"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(runtime, "_SHARED", folder)
    return folder / "hvmgr-0"


def test_it_is_made_for_this_user_alone_and_used_again(shared, monkeypatch, tmp_path):
    assert [runtime.own_folder(in_clear=True) for _ in range(2)] == [shared] * 2
    assert shared.stat().st_mode & 0o777 == 0o700
    assert runtime.own_folder(in_clear=False) == tmp_path / "data" / "hvmgr" / ".run"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
    assert {runtime.own_folder(in_clear=one) for one in (True, False)} == {Path("/run/user/0/hvmgr")}


@pytest.mark.parametrize("what", ["link", "dangling", "file", "other", "open", "not sticky", "not of root", "none"])
def test_what_is_not_safely_ours_is_not_used(shared, what, tmp_path):
    mine = tmp_path / "mine"
    if what == "link":
        mine.mkdir(mode=0o700)
        shared.symlink_to(mine)
    elif what == "dangling":
        shared.symlink_to(mine)
    elif what == "file":
        shared.touch(0o600)
    elif what in {"other", "open"}:
        shared.mkdir(mode=0o700)
        os.chown(shared, 1234 if what == "other" else 0, 0)
        shared.chmod(0o700 if what == "other" else 0o710)
    elif what == "not sticky":
        shared.parent.chmod(0o777)
    elif what == "not of root":
        os.chown(shared.parent, 1234, 0)
    else:
        shared.parent.rmdir()
    assert runtime.own_folder(in_clear=True) == tmp_path / "data" / "hvmgr" / ".run"
    assert not (mine.exists() and list(mine.iterdir()))


def test_of_an_ordinary_user_without_a_session(user):
    words = ["env", "-u", "XDG_RUNTIME_DIR", user.python, "-c"]
    done = user.run(*words, "from hvmgr.storage import runtime; print(runtime.own_folder(in_clear=True))")
    folder = Path(f"/dev/shm/hvmgr-{user.uid}")
    assert (done.stdout, done.returncode) == (f"{folder}\n", 0), done
    about = folder.lstat()
    folder.rmdir()
    assert (about.st_uid, about.st_mode & 0o777) == (user.uid, 0o700)
