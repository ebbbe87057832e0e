"""Who may use a file: what hvmgr says is what the kernel does, with modes, groups and access lists."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.storage import access

ME, OTHERS = 65534, 65533
KEPT = 0xFFFFFFFF

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be others")


@pytest.fixture
def folder():
    place = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place)


def set_acl(path, *, mask, user=None, group=None, own_group=0, others=0):
    """An access list with at most one user and one group, each (id, rights)."""
    entries = [(0x01, 7, KEPT)]
    entries += [(0x02, user[1], user[0])] if user else []
    entries += [(0x04, own_group, KEPT)]
    entries += [(0x08, group[1], group[0])] if group else []
    entries += [(0x10, mask, KEPT), (0x20, others, KEPT)]
    os.setxattr(
        path, "system.posix_acl_access", struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)
    )


def kernel_allows(path, uid, gid, wanted):
    """What the kernel says to a process with the user, the group and the user's groups."""
    flags = "".join(flag for bit, flag in ((4, "r"), (2, "w"), (1, "x")) if wanted & bit)
    test = " && ".join(f'test -{flag} "$0"' for flag in flags)
    user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "sh", "-c", test, path]
    return subprocess.run(user, check=False).returncode == 0


CASES = {
    "owner": lambda p: (os.chown(p, ME, 0), p.chmod(0o500)),
    "owner who keeps himself out": lambda p: (os.chown(p, ME, 0), p.chmod(0o077)),
    "group": lambda p: (os.chown(p, 0, ME), p.chmod(0o050)),
    "group that is kept out": lambda p: (os.chown(p, 0, ME), p.chmod(0o707)),
    "others": lambda p: p.chmod(0o701),
    "nobody": lambda p: p.chmod(0o700),
    "user in the list": lambda p: set_acl(p, user=(ME, 7), mask=7),
    "user in the list, less the mask": lambda p: set_acl(p, user=(ME, 7), mask=4),
    "another user in the list": lambda p: set_acl(p, user=(OTHERS, 7), mask=7),
    "user in the list without rights": lambda p: set_acl(p, user=(ME, 0), mask=7, others=7),
    "group in the list": lambda p: set_acl(p, group=(ME, 5), mask=7),
    "own group with a list": lambda p: (os.chown(p, 0, ME), set_acl(p, user=(OTHERS, 7), own_group=1, mask=7)),
    "mask is not the group's right": lambda p: (os.chown(p, 0, ME), set_acl(p, user=(OTHERS, 7), mask=7)),
    "others with a list": lambda p: set_acl(p, user=(OTHERS, 7), mask=7, others=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("wanted", [access.READ, access.WRITE, access.SEARCH, access.READ | access.WRITE])
def test_it_is_as_the_kernel_does(folder, require_program, case, wanted):
    require_program("setpriv")
    path = folder / "one"
    path.mkdir()
    case(path)
    assert access.allows(path, (ME, ME), wanted) == kernel_allows(path, ME, ME, wanted)


def test_group_of_the_user_counts_beside_the_one_that_libvirt_names(folder):
    user = pwd.getpwnam("libvirt-qemu")
    os.chown(folder, 0, user.pw_gid)
    folder.chmod(0o710)
    other = next(one.gr_gid for one in grp.getgrall() if one.gr_gid != user.pw_gid)
    assert access.allows(folder, (user.pw_uid, other), access.SEARCH)


def test_root_may_everything(folder):
    folder.chmod(0)
    assert access.allows(folder, (0, 0), 7)


def test_way_is_open_by_an_access_list(folder):
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(errors.Conflict, match="may not pass through") as caught:
        access.require_way(closed / "vms", (ME, ME))
    assert f"setfacl -m u:nobody:x '{closed}'" in caught.value.hint
    set_acl(closed, user=(ME, 1), mask=1)
    access.require_way(closed / "vms", (ME, ME))


def test_file_that_libvirt_will_give_away_needs_no_rights_of_its_own(folder):
    file = folder / "one.qcow2"
    file.touch(mode=0o600)
    access.require_usable(file, (ME, ME), dynamic=True, writable=True)
    access.require_usable(file, None, dynamic=False, writable=True)
    file.chmod(0o604)
    access.require_usable(file, (ME, ME), dynamic=False, writable=False)
    with pytest.raises(errors.Conflict, match=f"may not write {file}") as caught:
        access.require_usable(file, (ME, ME), dynamic=False, writable=True)
    assert f"chown nobody '{file}'" in caught.value.hint


def test_user_without_a_name_is_a_number():
    assert access.name_of(4_000_000_000) == "uid 4000000000"
