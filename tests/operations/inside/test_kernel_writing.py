"""The small machine that writes what no program does: each starts once, on an image alone."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model.put_options import PutOptions
from hvmgr.operations.inside import sources
from tests.operations.inside.test_writing import made, node, put
from tests.storage import file_trees

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300), pytest.mark.usefixtures("own_kernel")]

NAMES = [
    b"<8>", b"with space", b'quote"double', b"quote'single", b"-w", b"a;quit", b"\\back", b"\xff\xfe", b"#comment", b"$(x)`y`",
    b" leading", b"\t", b"x" * 255, b"?*[a]", b"\x1b[31m", b"~", b"new\nline",
]  # fmt: skip
ACL = bytes.fromhex("02000000") + bytes.fromhex(
    "01000600ffffffff02000400e803000004000400ffffffff10000400ffffffff20000000ffffffff"
)


def hostile_tree(folder):
    """A folder with names that a shell would take for something else, and what they are."""
    tree = os.fsencode(folder / "tree")
    os.mkdir(tree)
    for name in NAMES:
        os.mkdir(tree + b"/" + name)
        path = Path(os.fsdecode(tree + b"/" + name + b"/" + name))
        path.write_bytes(name * 40)
        path.chmod(0o640)
        os.utime(path, (5, 1_600_000_000))
    os.symlink("-no 'such'", tree + b"/link")
    return folder / "tree"


def test_xfs(tmp_path, require_program):
    require_program("mkfs.xfs")
    image = made(tmp_path / "xfs", 300 << 20, "mkfs.xfs", "-q", "-f")
    put(image, sources.of_host([hostile_tree(tmp_path)]).items, manner=PutOptions(uid=7, gid=8))
    for name in NAMES:
        found, _ = node(image, b"/tree/" + name + b"/" + name)
        assert (found.uid, found.gid, found.mode, found.modified) == (7, 8, 0o640, 1_600_000_000 * 10**9)
    file_trees.run("xfs_repair", "-n", image)


def test_btrfs_gets_back_what_was_with_its_attributes_and_none_besides(tmp_path, require_program):
    require_program("mkfs.btrfs")
    require_program("setfattr")
    seed = tmp_path / "seed"
    (seed / "srv").mkdir(parents=True)
    (seed / "srv" / "kept").write_text("present")
    os.setxattr(seed / "srv" / "kept", "user.present", b"1")
    try:
        os.setxattr(seed / "srv", "system.posix_acl_default", ACL)
    except OSError:
        pytest.skip("needs a file system with ACLs for its temporary files")
    image = made(tmp_path / "btrfs", 120 << 20, "mkfs.btrfs", "-q", "-f", "-r", seed)
    assert "system.posix_acl_default" in node(image, b"/srv")[1]
    (tmp_path / "kept").write_text("before")
    tree = hostile_tree(tmp_path)
    kept, *others = sources.of_host([tmp_path / "kept", tree]).items
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    extras = {"security.capability": capability, "security.selinux": b"srv_t\0", "user.before": b"2"}
    items = [dataclasses.replace(kept, uid=7, gid=8, mode=0o4755, extras=extras)]
    items += [dataclasses.replace(one, uid=7, gid=8) for one in others]
    folder = next(one for one in items if one.parts == (b"tree",))
    items[items.index(folder)] = dataclasses.replace(folder, extras={"system.posix_acl_default": ACL})
    put(image, items, b"/srv", PutOptions(overwrite=True, as_before=True))
    found, there = node(image, b"/srv/kept")
    assert (found.mode, found.uid, there) == (0o4755, 7, extras)
    assert node(image, b"/srv/tree")[1] == {"system.posix_acl_default": ACL}
    assert node(image, b"/srv/tree/~/~")[1] == {}
    file_trees.run("btrfs", "check", "-q", image)


def test_a_full_volume_is_told(tmp_path, require_program):
    require_program("mkfs.exfat")
    image = made(tmp_path / "exfat", 8 << 20, "mkfs.exfat")
    (tmp_path / "full").write_bytes(bytes(9 << 20))
    with pytest.raises(errors.NoSpace, match="no space left"):
        put(image, sources.of_host([tmp_path / "full"]).items)
