"""``--reader libguestfs``: what no reader of ours knows, by a real libguestfs; and its answers beside ours, where both know."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host import libguestfs, libguestfs_program
from hvmgr.operations.inside import looking, unlocking, views
from tests.storage import encrypted, file_trees

_MADE = """
add array0 format:raw
add array1 format:raw
add thin format:raw
add btrfs format:raw
add ruined format:raw
run
md-create disks "/dev/sda /dev/sdb" level:raid1
mkfs ext4 /dev/md127
pvcreate /dev/sdc
vgcreate vg /dev/sdc
debug sh "lvcreate -y -T -L 32M -V 40M -n thin vg/pool"
mkfs ext4 /dev/vg/thin
mkfs btrfs /dev/sdd
mkfs btrfs /dev/sde
mount /dev/md127 /
write /in-array "array"
umount /
mount /dev/vg/thin /
write /in-thin "thin"
umount /
mount /dev/sdd /
btrfs-subvolume-create /sub
write /sub/inner "inner"
write /outer "outer"
mkdir /full
debug sh "cd /sysroot/full; for one in $(seq 2500); do echo $one >n$one; done"
"""
_NAMES = ("array0", "array1", "thin", "btrfs", "squashfs", "locked", "damaged", "ext4", "ruined", "xfs", "twin")
_PARTS = 5


@pytest.fixture(scope="module")
def disks(tmp_path_factory, require_program, foreign_reader):
    """Raw disks, by their names; each beside the tree of files that the plain ones hold."""
    for name in ("guestfish", "mksquashfs", "cryptsetup", "mke2fs"):
        require_program(name)
    folder = tmp_path_factory.mktemp("foreign")
    for name, size in (("array0", 32), ("array1", 32), ("thin", 64), ("btrfs", 120), ("ruined", 120)):
        with (folder / name).open("wb") as file:
            file.truncate(size << 20)
    emulated = {**os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    subprocess.run(
        ["guestfish"], input=_MADE.encode(), cwd=folder, env=emulated, check=True, timeout=300, capture_output=True
    )
    tree = file_trees.make(folder / "tree")
    (tree / "large").write_bytes(file_trees.pattern(5 << 20))
    os.setxattr(tree / "large", "user.note", b"\0binary")
    squashed = folder / "squashfs"
    file_trees.run("mksquashfs", tree, squashed, "-quiet", "-no-progress")
    with squashed.open("r+b") as file:
        file.truncate(-(-squashed.stat().st_size // (1 << 20)) << 20)
    shutil.copy(squashed, folder / "locked")
    encrypted.luks2(folder / "locked", encrypted.key_file(folder))
    (folder / "two").mkdir()
    (folder / "two" / "a").write_bytes(b"what can be compressed\n" * 50_000)
    (folder / "two" / "b").write_bytes(b"sound")
    file_trees.run("mksquashfs", folder / "two", folder / "damaged", "-quiet", "-no-progress")
    with (folder / "damaged").open("r+b") as file:
        file.truncate(1 << 20)
        file.seek(100)
        file.write(b"\xff" * 64)  # the first block of the first file, behind the header
    file_trees.ext(folder / "ext4", tree, "-t", "ext4", size="40M")
    with (folder / "ruined").open("r+b") as file:
        file.seek(1 << 20)  # its superblock says that it is a Btrfs, and nothing else is left
        file.write(b"\xee" * (63 << 20))
    file_trees.xfs(folder / "xfs", folder / "two")
    shutil.copy(folder / "xfs", folder / "twin")
    parted(folder)
    return folder


def parted(folder):
    """A qcow2 image with several partitions, each with a file system of its own."""
    raw, size = folder / "parted.raw", 8 << 20
    with raw.open("wb") as file:
        file.truncate((_PARTS + 2) * size)
    lines = [f"start={(number + 1) * size // 512},size={size // 512}" for number in range(_PARTS)]
    file_trees.run("sfdisk", "-q", raw, input="\n".join(["label: gpt", *lines, ""]).encode())
    for number in range(_PARTS):
        own = folder / f"own{number}"
        own.mkdir()
        (own / f"only{number}").write_bytes(file_trees.pattern(1 << 20) + b"%d" % number)
        part = file_trees.ext(folder / "part", own, "-t", "ext4", size="8M")
        with raw.open("r+b") as file:
            file.seek((number + 1) * size)
            file.write(part.read_bytes())
        part.unlink()
    file_trees.run("qemu-img", "convert", "-O", "qcow2", raw, folder / "parted.qcow2")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What the machine has as a folder for temporary files; empty when it is gone."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def inside(disks, work):
    """All of them in one machine."""
    key = unlocking.Key((encrypted.KEY,))
    frozen = [views.of_image(disks / name, "raw") for name in _NAMES]
    frozen.append(views.of_image(disks / "parted.qcow2"))
    with looking.opened(frozen, keys=[key], libguestfs=True) as found:
        yield found


def volume(inside, name):
    (found,) = [one for one in inside.volumes if one.logical == name or one.disk.name.endswith(f"/{name}")]
    return found


def browser(inside, name):
    (found,) = [
        one for one in inside.volumes if looking.is_readable(one) and name in (one.logical, Path(one.title).name)
    ]
    return inside.browser(found)


def content(browser, path):
    return b"".join(bytes(piece) for _, piece in browser.content(browser.find(path)).pieces())


def test_what_only_its_machine_puts_together_is_read(inside):
    assert content(browser(inside, "md/disks"), b"/in-array") == b"array"
    assert content(browser(inside, "vg/thin"), b"/in-thin") == b"thin"
    legs = [one for one in inside.volumes if "array" in one.disk.name and not one.logical]
    assert [(one.kind, looking.is_readable(one)) for one in legs] == [("linux_raid_member", False)] * 2
    assert inside.choose(b"/in-array").volume.logical == "md/disks"


def test_tree_on_a_file_system_that_ours_do_not_know_is_whole(inside, disks):
    expected = file_trees.of_host(disks / "tree")
    assert file_trees.of_reader(browser(inside, "squashfs").reader) == expected
    assert file_trees.of_reader(browser(inside, "locked").reader) == expected
    assert volume(inside, "locked").encrypted


def test_says_of_each_file_what_our_reader_says(inside, disks):
    theirs = dict(file_trees.walked(browser(inside, "ext4").reader))
    with looking.opened([views.of_image(disks / "ext4", "raw")]) as own:
        reader = own.choose(b"/").reader
        ours = dict(file_trees.walked(reader))
        assert theirs.keys() == ours.keys()
        for path, node in ours.items():
            other = theirs[path]
            facts = [
                (
                    one.id,
                    one.type,
                    one.size,
                    one.mode,
                    one.uid,
                    one.gid,
                    one.links,
                    one.target,
                    one.modified,
                    one.changed,
                )
                for one in (node, other)
            ]
            assert facts[0] == facts[1], path
        large = theirs[b"large"], ours[b"large"]
        foreign = browser(inside, "ext4").reader
        assert foreign.extras(large[0]) == reader.extras(large[1]) == {"user.note": b"\0binary"}
        assert file_trees.hash_of(foreign, large[0]) == file_trees.hash_of(reader, large[1])


def test_partitions_of_one_image_are_read_at_once(inside):
    """They come by one connection, and the machine asks for all of them at any time."""
    for number in range(_PARTS):
        chosen = inside.choose(b"/only%d" % number)
        assert chosen.volume.number == number + 1
        assert content(chosen, b"/only%d" % number) == file_trees.pattern(1 << 20) + b"%d" % number


def test_one_tree_of_several_file_systems_is_walked(inside):
    btrfs = browser(inside, "btrfs")
    walked = [one for _, one in btrfs.walk(btrfs.root()) if not one.path.startswith(b"/full")]
    assert [one.path for one in walked] == [b"/", b"/outer", b"/sub", b"/sub/inner"]
    assert len({one.node.id for one in walked}) == 4


def test_large_folder_comes_in_several_answers(inside, monkeypatch):
    btrfs = browser(inside, "btrfs")
    machine, asked = btrfs.reader._machine, []
    btrfs.forget()  # another test may have been there
    stats = machine.stats
    monkeypatch.setattr(machine, "stats", lambda folder, names: asked.append(len(names)) or stats(folder, names))
    sizes = {one.name: one.node.size for one in btrfs.children(btrfs.find(b"/full"))}
    assert sizes == {b"n%d" % one: len(f"{one}\n") for one in range(1, 2501)}
    assert max(asked) == libguestfs.NAMES
    assert len(asked) < 10


def test_ruined_file_system_does_not_hide_the_others(inside):
    """Nor does a disk that is a copy of another one, with its id."""
    with pytest.raises(errors.Corrupt, match="cannot mount it"):
        browser(inside, "ruined")
    assert content(browser(inside, "xfs"), b"/b") == content(browser(inside, "twin"), b"/b") == b"sound"


def test_damage_is_told_and_the_rest_is_read(inside):
    damaged = browser(inside, "damaged")
    with pytest.raises(errors.Corrupt, match="damaged"):
        content(damaged, b"/a")
    assert content(damaged, b"/b") == b"sound"


def test_missing_path_and_stream_are_refused(inside):
    squashfs = browser(inside, "squashfs")
    with pytest.raises(errors.NotFound, match="there is no file 'larg'"):
        squashfs.find(b"/larg")
    with pytest.raises(errors.Unsupported, match="named streams"):
        squashfs.reader.content(squashfs.find(b"/large").node, "stream")


def test_get_says_who_reads_and_writes_nothing(hvmgr, disks, tmp_path):
    image, before = disks / "squashfs", (disks / "squashfs").read_bytes()
    refused = hvmgr("file", "get", "--image", image, "/large", "--to", tmp_path)
    assert refused.code == 5
    assert "no reader of hvmgr's knows squashfs, libguestfs may: --reader libguestfs" in refused.err
    done = hvmgr(
        "file",
        "get",
        "--image",
        image,
        "/large",
        "/names",
        "--to",
        tmp_path / "out",
        "--reader",
        "libguestfs",
        "--json",
    )
    assert done.code == 0
    (source,) = json.loads(done.out)["sources"]
    assert source["holds"] == "squashfs"
    assert source["reader"].startswith("libguestfs 1.")
    assert f"squashfs: read by {source['reader']}" in done.err
    assert (tmp_path / "out/large").read_bytes() == (disks / "tree/large").read_bytes()
    assert os.getxattr(tmp_path / "out/large", "user.note") == b"\0binary"
    assert sorted(os.listdir(os.fsencode(tmp_path / "out/names"))) == sorted(file_trees.STRANGE)
    assert image.read_bytes() == before


def test_machine_that_cannot_start_is_told(hvmgr, disks, monkeypatch, tmp_path):
    monkeypatch.setenv("SUPERMIN_KERNEL", str(tmp_path / "none"))
    monkeypatch.setenv("LIBGUESTFS_CACHEDIR", str(tmp_path))
    done = hvmgr("file", "list", "--image", disks / "squashfs", "/", "--reader", "libguestfs")
    assert done.code == 8
    assert "libguestfs cannot start its machine" in done.err
    assert "libguestfs-test-tool" in done.err
    assert "LIBGUESTFS_DEBUG" not in done.err  # what it advises itself is of no use here


def test_missing_library_is_named(hvmgr, tmp_path, monkeypatch):
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(libguestfs_program, "_LIBRARY", "libguestfs.so.none")
    done = hvmgr("file", "list", "--image", tmp_path / "image", "--reader", "libguestfs")
    assert (done.code, "apt install libguestfs0" in done.err) == (5, True)


def test_index_has_no_other_reader(hvmgr, vm):
    done = hvmgr("file", "find", vm, "/", "--index", "--reader", "libguestfs")
    assert done.code == 2
    assert "--reader" in done.err


def test_machine_that_is_killed_is_an_error(inside):
    """The last test of the machine: it is gone, and whatever it had is gone with it."""
    squashfs = browser(inside, "squashfs")
    os.kill(squashfs.reader._machine._program.pid, signal.SIGKILL)
    with pytest.raises(errors.HostFailed, match="libguestfs ended without an answer"):
        content(squashfs, b"/large")
