"""A command that changes images in place, killed before each thing that it does to the disk.

The command runs in a forked child, in which everything that changes files counts, and which ends without a word before its
n-th act. The next command has to find or make the state before or the state after; every image shows its bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import traceback

import pytest

from hvmgr import errors, vhd
from hvmgr.operations.images import changes
from hvmgr.storage import index
from hvmgr.vhd import repairing

MIB = 1 << 20
ACTS = ("fsync", "fdatasync", "rename", "unlink", "link", "ftruncate", "pwrite", "copy_file_range")
KILLED, DONE, WRONG = 9, 0, 1


def killed(act, number):
    """Whether the act was killed before the ``number``-th change of a file; False when it came through."""
    child = os.fork()
    if child == 0:
        code = WRONG
        try:
            _count(number)
            act()
            code = DONE
        except BaseException:  # noqa: BLE001 - the child ends here in any case
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (KILLED, DONE)
    return code == KILLED


def _count(number):
    left = [number]

    def counted(real):
        def call(*arguments, **more):
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)
            return real(*arguments, **more)

        return call

    for name in ACTS:
        setattr(os, name, counted(getattr(os, name)))


@pytest.fixture
def afresh(folder, tmp_path):
    """Puts the folder back as it was when first asked, before each kill."""
    kept = tmp_path / "kept"

    def put_back():
        if not kept.exists():
            shutil.copytree(folder.path, kept)
        for name in folder.names():
            (folder / name).unlink()
        for file in kept.iterdir():
            shutil.copy2(file, folder / file.name)

    return put_back


def every_kill(folder, afresh, act, stride=2):
    """After each kill, the folder as the killed command left it."""
    number = 1
    while True:
        afresh()
        if not killed(act, number):
            return
        yield number
        number += stride


def still_shows(folder, name, data):
    """The image shows these bytes, or can be repaired without a guess and shows them then."""
    try:
        assert folder.shown(name) == data
    except errors.Corrupt:
        assert "repairable" in {one.severity for one in folder.images.check(folder / name).faults}
        copy = folder / f"repaired-{name}"
        shutil.copy2(folder / name, copy)
        repairing.repair(copy, keep=repairing.Keep.END)
        assert folder.shown(copy.name) == data
        copy.unlink()


def nothing_left(folder):
    """No journal, no note of it, no half-made file."""
    return index.open_changes() == [] and not any(name.startswith(".") for name in folder.names())


def test_merge_is_completed_and_no_image_shows_anything_else(folder, afresh):
    shown = folder.chain("a.vhd", "b.avhd", "c.avhd")
    for number in every_kill(folder, afresh, lambda: folder.images.merge(folder / "b.avhd"), stride=3):
        if (folder / "b.avhd").exists():
            still_shows(folder, "b.avhd", shown[1])
        still_shows(folder, "c.avhd", shown[2])
        with contextlib.suppress(errors.NotFound):  # it was merged already, or is by now
            folder.images.merge(folder / "b.avhd")
        assert folder.shown("a.vhd") == shown[1], number
        assert folder.shown("c.avhd") == shown[2], number
        assert folder.images.check(folder / "c.avhd", chain=True).is_sound, number
        assert folder.names() == {"a.vhd", "c.avhd"}, number
        assert nothing_left(folder), number


@pytest.mark.parametrize("size", [300 * MIB, 2 * MIB], ids=["grow", "shrink"])
def test_resize_is_completed(folder, afresh, size):
    shown = folder.chain("a.vhd")[0]
    with vhd.open_image(folder / "a.vhd", writable=True) as image:
        image.write(0, bytes(4 * MIB))
        image.write(MIB, shown[MIB : 2 * MIB])
    for number in every_kill(folder, afresh, lambda: folder.images.resize(folder / "a.vhd", size, shrink=True)):
        folder.images.resize(folder / "a.vhd", size, shrink=True)
        assert folder.images.check(folder / "a.vhd").is_sound, number
        with vhd.open_image(folder / "a.vhd") as image:
            assert image.size == size, number
            start = bytearray(2 * MIB)
            image.read_into(0, memoryview(start))
        assert bytes(start) == bytes(MIB) + shown[MIB : 2 * MIB], number
        assert nothing_left(folder), number


@pytest.mark.parametrize("name", ["a.vhd", "a.raw"])
def test_compact_never_changes_the_disk(folder, afresh, name):
    data = bytes(MIB) + b"x" * MIB + bytes(2 * MIB)
    (folder / "a.raw").write_bytes(data)
    if name == "a.vhd":
        folder.images.convert(folder / "a.raw", folder / "a.vhd")
        (folder / "a.raw").unlink()
    for number in every_kill(folder, afresh, lambda: folder.images.compact(folder / name)):
        assert folder.shown(name) == data, number
        folder.images.compact(folder / name)
        assert folder.shown(name) == data, number
        assert folder.names() == {name}, number
        assert nothing_left(folder), number


def test_reparent_has_the_old_parent_or_the_new_one(folder, afresh):
    shown = folder.chain("a.vhd", "b.avhd")
    folder.images.convert(folder / "a.vhd", folder / "a parent with a much longer name than before.vhd")
    parent = folder / "a parent with a much longer name than before.vhd"
    for number in every_kill(folder, afresh, lambda: folder.images.reparent(folder / "b.avhd", parent)):
        still_shows(folder, "b.avhd", shown[1])
        folder.images.reparent(folder / "b.avhd", parent)
        assert folder.images.info(folder / "b.avhd").parent.path == parent, number
        assert folder.shown("b.avhd") == shown[1], number
        assert nothing_left(folder), number


def test_making_leaves_no_file_that_anybody_would_take_for_an_image(folder, afresh):
    folder.chain("a.vhd", "b.avhd")
    act = lambda: folder.images.convert(folder / "b.avhd", folder / "new.vhd")  # noqa: E731
    for number in every_kill(folder, afresh, act, stride=3):
        if (folder / "new.vhd").exists():
            assert folder.shown("new.vhd") == folder.shown("b.avhd"), number
            (folder / "new.vhd").unlink()
        act()
        assert folder.names() == {"a.vhd", "b.avhd", "new.vhd"}, number


def test_change_that_was_cut_off_is_told_and_waits_for_a_command_that_changes(folder, afresh):
    folder.chain("a.vhd", "b.avhd")
    for _ in every_kill(folder, afresh, lambda: folder.images.merge(folder / "b.avhd")):
        if index.open_changes() and (told := folder.images.info(folder / "a.vhd").open_change):
            assert "merge of" in told
            assert index.open_changes() == [changes.journal.beside(folder / "a.vhd")]
            break
    else:
        pytest.fail("no kill left a journal")
    folder.images.compact(folder / "a.vhd")
    assert nothing_left(folder)
    assert any("completed what was cut off" in notice for notice in folder.notices)
