"""What other programs, other users and guests do to image files while nobody looks: it is seen, and nothing is harmed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from hvmgr import ImageOptions, errors, settings
from hvmgr.host import loop
from hvmgr.model import image_plan
from hvmgr.operations import attaching, image_users
from hvmgr.operations.images import acts, changes
from hvmgr.storage import durable, index, journal

MIB = 1 << 20


@pytest.fixture
def pipe(folder):
    """A pipe where an image should be."""
    os.mkfifo(folder / "pipe.qcow2")
    return folder / "pipe.qcow2"


@pytest.mark.parametrize("verb", ["info", "chain", "check", "merge", "compact"])
def test_pipe_is_no_image(folder, pipe, verb):
    with pytest.raises(errors.UsageError, match="no image file"):
        getattr(folder.images, verb)(pipe)


def test_pipe_is_no_parent(folder, pipe):
    with pytest.raises(errors.UsageError, match="no image file"):
        folder.images.create(folder / "child.qcow2", options=ImageOptions(parent=pipe))
    assert folder.names() == {"pipe.qcow2"}


def test_block_device_is_not_changed_in_place(folder, monkeypatch):
    folder.raw("disk.raw")
    monkeypatch.setattr(Path, "is_block_device", lambda path: path.name == "disk.raw")
    with pytest.raises(errors.Unsupported, match="block device"):
        folder.images.compact(folder / "disk.raw")


def test_file_of_a_loop_device_is_busy(folder, monkeypatch, tmp_path):
    folder.raw("disk.raw")
    (tmp_path / "sys" / "loop7" / "loop").mkdir(parents=True)
    (tmp_path / "sys" / "loop7" / "loop" / "backing_file").write_text(f"{folder / 'disk.raw'}\n")
    monkeypatch.setattr(loop, "_SYS", tmp_path / "sys")
    with pytest.raises(errors.Conflict, match="/dev/loop7"):
        folder.images.resize(folder / "disk.raw", 8 * MIB)


class TestMeanwhile:
    """What another command does between the look and the lock."""

    @pytest.fixture
    def then(self, monkeypatch):
        """Something that happens while the lock is waited for."""
        real = index.locked

        def arrange(act):
            @contextlib.contextmanager
            def locked(paths, *, wait_s):
                act()
                with real(paths, wait_s=wait_s):
                    yield

            monkeypatch.setattr(changes.index, "locked", locked)

        return arrange

    def test_resized_image_is_looked_at_again(self, folder, then):
        folder.raw("disk.raw", size=4 * MIB)
        then(lambda: os.truncate(folder / "disk.raw", 16 * MIB))
        with pytest.raises(errors.Conflict, match="meanwhile"):
            folder.images.resize(folder / "disk.raw", 8 * MIB)
        assert (folder / "disk.raw").stat().st_size == 16 * MIB

    def test_merged_image_is_not_missed_by_a_traceback(self, folder, then):
        folder.chain("base.vhd", "child.vhd")
        then((folder / "child.vhd").unlink)
        with pytest.raises(errors.Conflict, match="meanwhile"):
            folder.images.merge(folder / "child.vhd")

    def test_new_child_is_not_lost(self, folder, then):
        folder.chain("base.qcow2", "child.qcow2")
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "child.qcow2", "-F", "qcow2", "top.qcow2"]
        then(lambda: subprocess.run(command, check=True, cwd=folder.path, timeout=60))
        with pytest.raises(errors.Conflict, match="meanwhile"):
            folder.images.merge(folder / "child.qcow2")
        assert {"base.qcow2", "child.qcow2", "top.qcow2"} <= folder.names()

    @pytest.mark.parametrize("act", ["compact", "create", "attach"])
    def test_command_that_died_is_not_forgotten(self, folder, then, act):
        """Its journal is there when the lock is free, and was not before."""
        folder.raw("disk.raw")
        child = ImageOptions(parent=folder / "disk.raw")
        plan = changes.plan_of("image merge", "a merge", [image_plan.RemoveMerged(str(folder / "disk.raw"))])

        def die():
            index.note_change(journal.beside(folder / "disk.raw"))
            journal.begin(journal.beside(folder / "disk.raw"), plan)

        then(die)
        with pytest.raises(errors.Conflict, match="cut off just now"):
            if act == "attach":
                folder.host.attach_image(folder / "disk.raw")
            elif act == "create":
                folder.images.create(folder / "child.qcow2", options=child)
            else:
                folder.images.compact(folder / "disk.raw")
        assert folder.names() == {"disk.raw", ".disk.raw.hvmgr-change"}


class TestJournal:
    """A file beside an image that says what is to be done: by whom it was written counts."""

    def plant(self, folder, victim):
        plan = changes.plan_of("image merge", "a merge", [image_plan.RemoveMerged(str(victim))])
        journal.begin(journal.beside(folder / "disk.raw"), plan)

    def test_of_nobody_knows_whom_is_not_carried_out(self, folder):
        folder.raw("disk.raw")
        folder.raw("victim.raw")
        self.plant(folder, folder / "victim.raw")
        with pytest.raises(errors.Conflict, match="not by this user on this host"):
            folder.images.compact(folder / "disk.raw")
        assert "victim.raw" in folder.names()
        assert folder.images.info(folder / "disk.raw").open_change is None

    def test_pipe_is_not_waited_for(self, folder):
        folder.raw("disk.raw")
        os.mkfifo(journal.beside(folder / "disk.raw"))
        assert folder.images.info(folder / "disk.raw").open_change is None
        with pytest.raises(errors.Conflict, match="not by this user on this host"):
            folder.images.compact(folder / "disk.raw")

    def test_is_completed_before_an_image_is_attached(self, folder, monkeypatch):
        folder.raw("disk.raw")
        folder.raw("merged.raw")
        index.note_change(journal.beside(folder / "disk.raw"))
        self.plant(folder, folder / "merged.raw")
        monkeypatch.setattr(attaching, "attach", lambda *_, **__: None)
        folder.host.attach_image(folder / "disk.raw")
        assert folder.names() == {"disk.raw"}

    def test_name_that_leaves_no_room_for_one_can_be_looked_at(self, folder):
        name = "x" * 250 + ".raw"
        folder.raw(name)
        assert folder.images.info(folder / name).size == 4 * MIB
        with pytest.raises(errors.UsageError, match="too long"):
            folder.images.resize(folder / name, 8 * MIB)
        assert not list((settings.index_folder() / "changes").iterdir())


def test_guest_that_writes_a_header_into_its_raw_disk_changes_no_merge(folder):
    """Read as qcow2 the disk would have a parent of the guest's choice."""
    folder.raw("secret.raw")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "secret.raw", "-F", "raw", folder / "disk.raw"]
    subprocess.run(command, check=True, timeout=60)
    os.truncate(folder / "disk.raw", 4 * MIB)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", folder / "top.qcow2"]
    subprocess.run(command, check=True, timeout=60)
    before = folder.bytes_of_files()
    for into in (None, folder / "secret.raw"):
        with pytest.raises(errors.Conflict, match="states that its parent"):
            folder.images.merge(folder / "top.qcow2", into=into)
    assert folder.bytes_of_files() == before


def test_internal_snapshots_do_not_go_with_a_merged_image(folder):
    folder.chain("base.qcow2", "child.qcow2")
    subprocess.run(["qemu-img", "snapshot", "-c", "then", folder / "child.qcow2"], check=True, timeout=60)
    before = folder.bytes_of_files()
    with pytest.raises(errors.Unsupported, match="internal snapshots"):
        folder.images.merge(folder / "child.qcow2")
    assert folder.bytes_of_files() == before
    folder.images.merge(folder / "child.qcow2", keep=True)
    assert (folder / "child.qcow2").exists()


def test_unfinished_file_of_another_command_is_not_swept(folder):
    folder.chain("base.vhd")
    others, dead = (folder / f"{durable.TEMPORARY}{'a' * length}" for length in (32, 16))
    for path in (others, dead):
        path.touch()
    acts._sweep(folder.path)
    assert others.exists()
    assert not dead.exists()


def test_unfinished_child_of_a_dead_command_is_no_child(folder):
    folder.chain("base.qcow2", "child.qcow2")
    (folder / "child.qcow2").rename(durable.part_of(folder / "child.qcow2"))
    assert folder.images.info(folder / "base.qcow2").used_by == ()
    assert folder.images.resize(folder / "base.qcow2", 8 * MIB)


class TestCompact:
    """A copy of a qcow2 image has its blocks, and takes its place only where it takes less."""

    def made(self, folder, *options):
        folder.raw("content.raw")
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, folder / "content.raw"]
        subprocess.run([*command, folder / "disk.qcow2"], check=True, timeout=60)
        return folder / "disk.qcow2"

    def test_blocks_keep_their_size(self, folder):
        path = self.made(folder, "-o", "cluster_size=2M", "-S", "0")
        folder.images.compact(path)
        assert folder.images.info(path).block_size == 2 * MIB

    def test_compressed_image_does_not_grow(self, folder):
        (folder / "content.raw").write_bytes(b"x" * 4 * MIB)
        command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", folder / "content.raw"]
        subprocess.run([*command, folder / "disk.qcow2"], check=True, timeout=60)
        before = (folder / "disk.qcow2").read_bytes()
        assert folder.images.compact(folder / "disk.qcow2") == 0
        assert (folder / "disk.qcow2").read_bytes() == before
        assert folder.names() == {"content.raw", "disk.qcow2"}


def test_home_is_known_by_whatever_path_it_is_reached(tmp_path):
    home = tmp_path / "root" / "web"
    (home / "disks").mkdir(parents=True)
    (home / "disks" / "a.raw").touch()
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert image_users.is_inside(home / "disks" / "a.raw", tmp_path / "link" / "web")
    assert not image_users.is_inside(home / "disks" / "a.raw", tmp_path / "link" / "db")


@pytest.mark.parametrize("name", ["child.qcow2", "odd,name:\udcff.qcow2"])
def test_child_without_its_parent_is_checked(folder, name):
    folder.chain("base.qcow2", "child.qcow2")
    (folder / "child.qcow2").rename(folder / name)
    assert folder.images.check(folder / name).is_sound
    if name.isprintable():
        (folder / "base.qcow2").unlink()
        assert folder.images.check(folder / name).is_sound
        assert [one.code for one in folder.images.check(folder / name, chain=True).faults] == ["parent-missing"]


@pytest.mark.parametrize(("name", "size"), [("a.raw", (1 << 63) - 512), ("a.qcow2", 1 << 62)])
def test_size_that_no_file_can_have_is_told_of_the_file_that_was_named(folder, name, size):
    with pytest.raises(errors.Unsupported) as refused:
        folder.images.create(folder / name, size)
    assert durable.TEMPORARY not in refused.value.message
    assert folder.names() == set()


def test_fixed_vhd_without_its_end_is_not_called_sound(folder):
    folder.images.create(folder / "disk.vhd", 4 * MIB, ImageOptions(fixed=True))
    assert folder.images.check(folder / "disk.vhd").is_sound
    os.truncate(folder / "disk.vhd", 4 * MIB)
    found = folder.images.check(folder / "disk.vhd")
    assert [one.code for one in found.faults] == ["other-format"]
    assert not found.is_sound


def test_child_that_no_vm_has_states_the_format_of_its_parent(folder):
    folder.chain("looks.qcow2")  # what a guest wrote into its raw disk
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "looks.qcow2", "-F", "raw", folder / "top.qcow2"]
    subprocess.run([*command, "4M"], check=True, timeout=60)
    assert image_users.stated_format(folder.host, folder / "looks.qcow2") == "raw"
    assert image_users.stated_format(folder.host, folder / "top.qcow2") is None


class TestNamesThatAreNotUnicode:
    """QEMU is told names in JSON, and a VHD stores them in UTF-16."""

    def test_image_for_qemu_is_refused_and_stays(self, folder):
        folder.chain("base.qcow2", "child.qcow2")
        (folder / "child.qcow2").rename(folder / "\udcff.qcow2")
        before = folder.bytes_of_files()
        with pytest.raises(errors.Unsupported, match="not UTF-8"):
            folder.images.merge(folder / "\udcff.qcow2")
        assert folder.bytes_of_files() == before

    def test_vhd_gets_no_parent_that_nobody_would_find(self, folder):
        folder.images.create(folder / "\udcff.vhd", 4 * MIB)
        with pytest.raises(errors.Unsupported, match="not UTF-8"):
            folder.images.create(folder / "child.vhd", options=ImageOptions(parent=folder / "\udcff.vhd"))
        assert folder.names() == {"\udcff.vhd"}

    def test_file_of_a_loop_device_is_known(self, monkeypatch, tmp_path):
        (tmp_path / "sys" / "loop7" / "loop").mkdir(parents=True)
        (tmp_path / "sys" / "loop7" / "loop" / "backing_file").write_bytes(b"/srv/\xff.raw\n")
        monkeypatch.setattr(loop, "_SYS", tmp_path / "sys")
        assert loop.backing(Path("/dev/loop7")) == "/srv/\udcff.raw"


def test_empty_file_has_no_disk_to_attach(folder):
    (folder / "empty.raw").touch()
    with pytest.raises(errors.UsageError, match="is empty"):
        folder.host.attach_image(folder / "empty.raw")
