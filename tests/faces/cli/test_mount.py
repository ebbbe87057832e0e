"""``hvmgr mount``, ``unmount`` and ``mounts``: real images, the kernel's own file systems, in a mount namespace of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hvmgr.operations import mounting as operation
from hvmgr.storage import attachments
from tests.faces.cli.test_documentation import PAGE, keys
from tests.operations.images import attaching as help_
from tests.operations.images import mounting
from tests.operations.images.mounting import FILES, MIB

pytestmark = pytest.mark.timeout(300)

SHAPES = {
    name: json.loads(text)
    for name, text in re.findall(r"<!-- mount shape: ([\w ]+) -->\n```json\n(.*?)```", PAGE, re.DOTALL)
}


@pytest.fixture
def space(root, require_program):
    help_.skip_where_impossible()
    for name in ("mke2fs", "nsenter", "unshare"):
        require_program(name)
    with mounting.space() as made:
        yield made
    for one in attachments.all_records():  # of a test that failed
        operation._take_down(one)


@pytest.fixture
def at(tmp_path):
    """An empty directory to mount at."""
    folder = tmp_path / "at"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    return mounting.make_disk(folder / "disk.raw", mounting.fill(folder / "files"))


@pytest.fixture
def web(hvmgr, root, disk):
    """A VM that is off, with the disk and the snapshot a; what it has now is on an image above that."""
    words = ["--memory", "64M", "--network", "none", "--accel", "tcg"]
    hvmgr.ok("vm", "create", "web", *words, "--disk", disk)
    hvmgr.ok("snapshot", "create", "web", "a")
    return root / "web"


def seen(space, directory):
    """The files in a directory, read by a program of that namespace."""
    return {name: (Path(f"/proc/{space.pid}/root{directory}") / name).read_bytes() for name in FILES}


def test_snapshot_is_read_and_written_on_and_its_images_stay(hvmgr, web, space, at, tmp_path):
    before = mounting.hashes(web)
    assert len(before) == 2
    made = space.hvmgr("mount", "web", at, "--snapshot", "a")
    assert keys(made) == keys(SHAPES["mount"])
    one = made["mount"]
    assert (one["vm"], one["snapshot"], one["slot"], one["partition"]) == ("web", "a", "vda", 1)
    assert (one["file_system"], one["writable"], one["overlay"], one["state"]) == ("ext4", False, None, "mounted")
    assert seen(space, at) == FILES
    assert {"ro", "nosuid", "nodev", "noexec"} <= space.options(at)
    assert space.run("touch", at / "new", ok=False).returncode != 0
    listed = space.hvmgr("mounts")
    assert keys(listed) == keys(SHAPES["mounts"])
    assert listed["mounts"] == [one]
    assert "is a mount point already" in space.fails("mount", "web", at, code=4)
    assert f"belongs to the mount at {at}" in space.fails("image", "detach", one["device"], code=4)
    again = space.hvmgr("unmount", at)
    assert keys(again) == keys(SHAPES["unmount"])
    assert space.options(at) is None
    assert help_.is_clean()


def test_what_is_written_is_thrown_away_or_kept(hvmgr, web, space, at, tmp_path):
    kept = tmp_path / "kept.qcow2"
    before = mounting.hashes(web)
    for words in ([], ["--keep", kept]):
        one = space.hvmgr("mount", "web", at, "--snapshot", "a", "--writable")["mount"]
        assert {"rw", "nosuid", "nodev", "noexec"} <= space.options(at)
        assert seen(space, at) == FILES, "what was thrown away does not come back"
        space.sh(f"rm -r '{at}/sub'; echo new > '{at}/hello'")
        assert Path(one["overlay"]).stat().st_mode & 0o077 == 0
        if words:
            assert "there is no directory" in space.fails("unmount", at, "--keep", tmp_path / "no" / "where", code=3)
            assert "is there already" in space.fails("unmount", at, "--keep", tmp_path, code=4)
            assert "is unmounted first" in space.fails("unmount", at, "--keep", at / "lost+found" / "kept", code=2)
            bases = web / "Virtual Hard Disks"
            assert "would pass for one of its images" in space.fails("unmount", at, "--keep", bases / "k", code=2)
            space.sh(f"mkdir '{tmp_path}/closed'; mount -t tmpfs -o ro none '{tmp_path}/closed'")
            assert f"written in {tmp_path}/closed" in space.fails(
                "unmount", at, "--keep", tmp_path / "closed" / "k", code=8
            )
            assert space.options(at) is not None
        done = space.hvmgr("unmount", at, *words)
        assert not Path(one["overlay"]).exists()
        assert mounting.hashes(web) == before
    assert done["kept"] == str(kept)
    assert Path(done["parent"]) in before
    info = json.loads(help_.run("qemu-img", "info", "--output=json", kept))
    assert (info["backing-filename"], info["backing-filename-format"]) == (done["parent"], "raw")

    space.hvmgr("mount", "--image", kept, at)
    assert space.sh(f"cat '{at}/hello'; ls '{at}'") == "new\nhello\nlost+found\nstrange \n\t name\n"
    space.hvmgr("unmount", at)
    # As long as it is there, what it stands on is needed.
    assert {one.mount.kept for one in attachments.all_records()} == {str(kept)}
    assert attachments.users([done["parent"]])
    kept.unlink()
    space.hvmgr("mount", "web", at)
    space.hvmgr("unmount", at)
    assert help_.is_clean()


def test_snapshots_that_are_mounted_stay_and_those_below_wait(hvmgr, web, space, at):
    (image,) = hvmgr.ok("vm", "show", "web", "--json").json["now"]["disks"].values()
    help_.run("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", image)  # before the partition
    hvmgr.ok("snapshot", "create", "web", "b")
    hvmgr.ok("snapshot", "create", "web", "c")
    space.hvmgr("mount", "web", at, "--snapshot", "c")
    before = mounting.hashes(web)
    refused = hvmgr("snapshot", "delete", "web", "c")
    assert refused.code == 4
    assert f"is mounted at {at}\n" in refused.err
    told = hvmgr("snapshot", "delete", "web", "b")
    assert told.code == 0
    assert f"{image} stays as it is: the mount at {at} needs it" in told.err
    assert mounting.hashes(web) == before
    assert seen(space, at) == FILES
    space.hvmgr("unmount", at)
    hvmgr.ok("snapshot", "merge", "web")
    assert len(mounting.hashes(web)) == len(before) - 1
    space.hvmgr("mount", "web", at, "--snapshot", "c")
    assert seen(space, at) == FILES
    space.hvmgr("unmount", at)
    assert help_.is_clean()


def test_vm_does_not_start_while_its_present_is_mounted(hvmgr, web, space, at):
    space.hvmgr("mount", "web", at)
    for words in (
        ("vm", "start", "web"),
        ("snapshot", "create", "web"),
        ("snapshot", "apply", "web", "a"),
        ("snapshot", "revert", "web"),
        ("freeze", "web", "--", "true"),
    ):
        refused = hvmgr(*words)
        assert refused.code == 4, refused
        assert f"mounted at {at}" in refused.err
        assert f"hvmgr unmount {at}" in refused.err
    space.hvmgr("unmount", at)
    hvmgr.ok("snapshot", "create", "web", "b")


def test_mounts_do_not_hold_each_other_nor_those_of_others(hvmgr, web, space, disk, at, tmp_path):
    """Where nothing that is mounted or unmounted is heard of in another namespace."""
    others, foreign, second = tmp_path / "others.img", tmp_path / "foreign", tmp_path / "second"
    foreign.mkdir()
    second.mkdir()
    with others.open("wb") as file:
        file.truncate(4 * MIB)
    subprocess.run(["mke2fs", "-q", "-F", others], check=True, timeout=60)
    space.sh(f"mount -o loop '{others}' '{foreign}'")
    space.hvmgr("mount", "web", at, "--snapshot", "a")
    space.hvmgr("mount", "web", second, "--snapshot", "a")
    assert help_.run("losetup", "--associated", others)
    space.sh(f"umount '{foreign}'")
    assert help_.run("losetup", "--associated", others) == ""
    space.hvmgr("unmount", at)
    assert [one["directory"] for one in space.hvmgr("mounts")["mounts"]] == [str(second)]
    assert seen(space, second) == FILES
    space.hvmgr("unmount", second)
    assert help_.is_clean()


def test_vm_is_not_deleted_nor_moved_while_a_snapshot_is_mounted(hvmgr, web, space, at, tmp_path):
    space.hvmgr("mount", "web", at, "--snapshot", "a")
    for words in (("vm", "delete", "web", "--yes"), ("vm", "move", "web", web.parent / "moved")):
        refused = hvmgr(*words)
        assert refused.code == 4, refused
        assert f"is mounted at {at}\n" in refused.err
        assert f"hvmgr unmount {at}" in refused.err
    space.hvmgr("unmount", at)
    hvmgr.ok("vm", "delete", "web", "--yes")


def test_journal_is_replayed_in_an_image_of_its_own(space, disk, at, tmp_path):
    dirty = tmp_path / "dirty.raw"
    offset = f"offset={mounting.START},sizelimit={15 * MIB}"
    shutil.copy(disk, tmp_path / "live.raw")
    space.sh(
        f"mount -o loop,{offset} {tmp_path}/live.raw {at}; echo late > {at}/late; sync -f {at}; cp {tmp_path}/live.raw {dirty}"
    )
    space.sh(f"umount {at}")
    before = mounting.hashes(tmp_path)
    one = space.hvmgr("mount", "--image", dirty, at)["mount"]
    assert "was not cleanly unmounted: its journal is replayed in a throw-away image" in space.said
    assert not one["writable"]
    assert "ro" in space.options(at)
    assert space.sh(f"cat {at}/late") == "late\n"
    assert mounting.hashes(tmp_path) == before
    space.hvmgr("unmount", at)
    assert not Path(one["overlay"]).exists()
    assert help_.is_clean()


def test_what_has_no_journal_to_replay_is_refused_as_it_is(space, disk, at, tmp_path):
    damaged = tmp_path / "damaged.raw"
    data = bytearray(disk.read_bytes())
    data[mounting.START + 1024 + 0x18 : mounting.START + 1024 + 0x1C] = b"\xff" * 4  # the size of a block
    damaged.write_bytes(data)
    assert "the ext4 on damaged.raw partition 1 cannot be mounted" in space.fails(
        "mount", "--image", damaged, at, code=8
    )
    assert "journal" not in space.said
    assert help_.is_clean()


def test_ntfs_is_written_in_an_image_of_its_own(space, at, tmp_path, require_program):
    for name in ("mkntfs", "ntfs-3g", "ntfscat"):
        require_program(name)
    image = tmp_path / "ntfs.raw"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkntfs", "-q", "-F", "-Q", image], check=True, timeout=60, capture_output=True)
    before = mounting.hashes(tmp_path)
    space.hvmgr("mount", "--image", image, at, "--writable")
    space.sh(f"echo data > '{at}/file'; echo stream > '{at}/file:more'")
    space.hvmgr("unmount", at, "--keep", tmp_path / "kept.qcow2")
    help_.run("qemu-img", "convert", "-O", "raw", tmp_path / "kept.qcow2", tmp_path / "kept")
    assert help_.run("ntfscat", "-n", "more", tmp_path / "kept", "file") == "stream\n"
    assert before.items() <= mounting.hashes(tmp_path).items()


def test_left_over_mounts_are_listed_and_cleaned(hvmgr, web, space, at, tmp_path):
    def broken(*words):
        one = space.hvmgr("mount", "web", at, "--snapshot", "a", *words)["mount"]
        if words:
            space.sh(f"echo new > '{at}/hello'; sync -f '{at}'")
        (record,) = attachments.all_records()
        for pid, _ in record.processes:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 40
        while attachments.all_records()[0].is_alive:
            assert time.monotonic() < deadline
        assert [one["state"] for one in hvmgr.ok("mounts", "--json").json["mounts"]] == ["left over"]
        return one

    before = mounting.hashes(web)
    broken()
    space.hvmgr("unmount", at)
    assert "was broken off and is cleaned up" in space.said
    assert help_.is_clean()

    broken()
    found = [one for one in hvmgr("doctor", "--json").json["findings"] if one["code"] == "mount-left"]
    assert [one["where"] for one in found] == [str(at)]
    space.run("umount", "--lazy", at)  # so that the repair may be made in this process
    hvmgr("doctor", "--repair")
    assert help_.is_clean()

    broken("--writable")
    space.run("umount", "--lazy", at)
    (found,) = [one for one in hvmgr("doctor", "--repair", "--json").json["findings"] if one["code"] == "mount-left"]
    assert "--keep" in found["repair"]
    space.hvmgr("unmount", at, "--keep", tmp_path / "kept.qcow2")
    space.hvmgr("mount", "--image", tmp_path / "kept.qcow2", at)
    assert space.sh(f"cat '{at}/hello'") == "new\n"
    space.hvmgr("unmount", at)
    assert mounting.hashes(web) == before


def test_export_on_read_only_media(hvmgr, web, space, at, tmp_path):
    hvmgr.ok("export", "web", tmp_path / "out")
    media = tmp_path / "out"
    before = mounting.hashes(media)
    space.sh(f"mount --bind '{media}' '{media}'; mount -o remount,bind,ro '{media}'; ! touch '{media}/x' 2>/dev/null")
    for words in (["--snapshot", "a"], ["--writable"]):
        space.hvmgr("mount", "--home", media / "web", at, *words)
        assert seen(space, at) == FILES
        if "--writable" in words:
            space.sh(f"echo new > '{at}/hello'")
        space.hvmgr("unmount", at)
    assert mounting.hashes(media) == before
    assert help_.is_clean()


def test_bad_input(hvmgr, web, space, at, tmp_path):
    """One sentence each, and nothing is left."""
    full, bare = tmp_path / "full", tmp_path / "bare.raw"
    full.mkdir()
    (full / "file").touch()

    def refuse(code, words, *arguments):
        answer = hvmgr("mount", *arguments, "--json")  # before anything is mounted: no namespace is needed
        assert (answer.code, words in answer.json["error"]["message"]) == (code, True), answer

    refuse(3, "no directory", "web", tmp_path / "nowhere")
    refuse(2, "is no directory", "web", full / "file")
    refuse(4, "is not empty", "web", full)
    refuse(3, "'nobody'", "nobody", at)
    refuse(3, "'b'", "web", at, "--snapshot", "b")
    refuse(3, "vdz", "web", at, "--disk", "vdz")
    refuse(3, "there is no partition 7", "web", at, "--partition", "7")
    refuse(2, "needs what to mount", "web")
    refuse(2, "exclude each other", "--home", full, "--image", bare, at)
    for head, sentence in (
        (b"", "no file system that hvmgr knows"),
        (b"LUKS\xba\xbe\0\1".ljust(512, b"\0"), "cannot be mounted: it is encrypted (LUKS)"),
        (b"\xeb\x58\x90-FVE-FS-".ljust(510, b"\0") + b"\x55\xaa", "cannot be mounted: it is encrypted (BitLocker)"),
    ):
        with bare.open("wb") as file:
            file.truncate(3 * MIB)
            mounting.put_table(file, [(MIB, 2 * MIB)])
            file.seek(MIB)
            file.write(head)
        refuse(5, sentence, "--image", bare, at)
    two = tmp_path / "two.raw"
    with two.open("wb") as file:
        file.truncate(9 * MIB)
        mounting.put_table(file, [(MIB, 4 * MIB), (5 * MIB, 4 * MIB)])
    for start in (MIB, 5 * MIB):
        command = ["mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024", "-E", f"offset={start}", two, "4096"]
        subprocess.run(command, check=True, timeout=60, stderr=subprocess.DEVNULL)
    refuse(2, "there are 2 file systems", "--image", two, at)
    space.hvmgr("mount", "--image", two, at, "--partition", "2")
    with (at / "x").open("w"):
        pass  # in this namespace the directory is as it was
    (at / "x").unlink()
    holder = subprocess.Popen(
        ["nsenter", f"--mount=/proc/{space.pid}/ns/mnt", "--", "sh", "-c", f"cd '{at}'; echo; exec sleep 600"],
        stdout=subprocess.PIPE,
    )
    with holder:
        holder.stdout.readline()
        assert f"a program uses {at}" in space.fails("unmount", at, code=4)
        holder.kill()
    assert "nothing to keep" in space.fails("unmount", at, "--keep", tmp_path / "kept", code=2)
    assert space.hvmgr("unmount", at, "--dry-run")["plan"]["subject"] == f"unmount {at}"
    space.hvmgr("unmount", at)
    assert "has mounted nothing" in space.fails("unmount", at, code=3)
    damaged = bytearray(two.read_bytes())
    damaged[MIB + 1024 + 0x18 : MIB + 1024 + 0x1C] = b"\xff" * 4  # the size of a block
    two.write_bytes(damaged)
    assert "cannot be mounted" in space.fails("mount", "--image", two, at, "--partition", "1", code=8)
    assert help_.is_clean()


def test_ordinary_user_mounts_by_fuse_alone(user, space, disk, require_program):
    """A user who may open /dev/fuse; what fuse2fs shows him is all of it, whoever it belongs to in the guest."""
    for name in ("fuse2fs", "fusermount3", "debugfs"):
        require_program(name)
    folder = user.home / "mounting"
    at, image, kept = folder / "at", folder / "disk.raw", folder / "kept.qcow2"
    at.mkdir(parents=True)
    shutil.copy(disk, image)
    help_.run("debugfs", "-w", "-R", "set_inode_field hello mode 0100600", f"{image}?offset={mounting.START}")
    user.owns(folder)
    space.sh(f"mknod {folder}/fuse c 10 229; chmod 0600 {folder}/fuse; mount --bind {folder}/fuse /dev/fuse")
    space.user = user
    assert "this user may not open /dev/fuse" in space.fails("mount", "--image", image, at, code=5)
    space.sh("chmod 0666 /dev/fuse")
    before = mounting.hashes(folder)

    def read(name):
        return space.run(*user.command("cat", at / name)).stdout

    made = space.hvmgr("mount", "--image", image, at)
    assert keys(made) == keys(SHAPES["mount"])
    assert (made["mount"]["device"], made["mount"]["state"]) == (None, "mounted")
    assert {"nosuid", "nodev", "noexec"} <= space.options(at)
    assert "Read-only" in space.run(*user.command("touch", at / "new"), ok=False).stderr
    assert read("hello") == "hello\n"
    assert space.hvmgr("mounts")["mounts"] == [made["mount"]]
    space.hvmgr("unmount", at)
    space.hvmgr("mount", "--image", image, at, "--writable")
    space.run(*user.command("sh", "-c", f"echo new > {at}/hello"))
    space.hvmgr("unmount", at, "--keep", kept)
    assert before.items() <= mounting.hashes(folder).items()
    made = space.hvmgr("mount", "--image", kept, at)
    assert read("hello") == "new\n"
    records = [json.loads(one.read_text()) for one in (user.root / ".index" / "attachments").glob("*.json")]
    assert len(records) == 2, "the kept image has one, too"
    for pid, _ in [process for one in records for process in one["processes"]]:
        os.kill(pid, signal.SIGKILL)
    assert [one["state"] for one in space.hvmgr("mounts")["mounts"]] == ["left over"]
    space.hvmgr("unmount", at)
    assert space.hvmgr("mounts")["mounts"] == []
    assert space.options(at) is None
    assert not list((user.folder / "run" / "hvmgr").iterdir())

    dirty = folder / "dirty.raw"
    space.sh(f"mount -o loop,offset={mounting.START},sizelimit={15 * MIB} {image} {at}; echo late > {at}/late; sync -f {at};"
             f" cp {image} {dirty}; umount {at}")  # fmt: skip
    user.owns(folder)
    before = mounting.hashes(folder)
    space.hvmgr("mount", "--image", dirty, at)
    assert "its journal is replayed in a throw-away image" in space.said
    assert read("late") == "late\n"
    space.hvmgr("unmount", at)
    assert mounting.hashes(folder) == before
