"""Merging: what each image shows stays, nobody else's image is touched, and a refusal changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hvmgr
from hvmgr import ImageOptions, errors, vhd
from hvmgr.host import storage_daemon
from hvmgr.storage import index
from tests.operations.images.conftest import filled

MIB = 1 << 20
KINDS = [
    pytest.param(["a.vhd", "b.avhd", "c.avhd", "d.avhd"], id="vhd"),
    pytest.param(["a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2"], id="qcow2"),
]


@pytest.mark.parametrize("names", KINDS)
class TestMerge:
    def test_parent_takes_the_data_and_keeps_its_name_and_id(self, folder, names):
        shown = folder.chain(*names[:2])
        before = folder.images.info(folder / names[0]).id
        merged = folder.images.merge(folder / names[1])
        assert (merged.path, merged.id) == (folder / names[0], before)
        assert folder.shown(names[0]) == shown[1]
        assert folder.names() == {names[0]}

    def test_what_stood_on_the_child_stands_on_the_parent(self, folder, names):
        shown = folder.chain(*names)
        folder.images.merge(folder / names[2])
        assert folder.shown(names[3]) == shown[3]
        assert folder.shown(names[1]) == shown[2]
        assert folder.shown(names[0]) == shown[0]
        assert folder.names() == {names[0], names[1], names[3]}

    def test_into_an_ancestor_everything_between_goes(self, folder, names):
        shown = folder.chain(*names)
        folder.images.merge(folder / names[3], into=folder / names[0])
        assert folder.shown(names[0]) == shown[3]
        assert folder.names() == {names[0]}

    def test_keep_leaves_the_merged_images(self, folder, names):
        shown = folder.chain(*names[:3])
        folder.images.merge(folder / names[2], into=folder / names[0], keep=True)
        assert folder.shown(names[0]) == shown[2]
        assert folder.names() == set(names[:3])

    def test_sibling_is_never_harmed(self, folder, names):
        folder.chain(*names[:3])
        folder.images.create(folder / f"x{names[1]}", options=ImageOptions(parent=folder / names[0]))
        before = folder.bytes_of_files()
        for child, into in ((names[1], None), (names[2], folder / names[0])):
            with pytest.raises(errors.Conflict, match=f"x{names[1]}"):
                folder.images.merge(folder / child, into=into)
        assert folder.bytes_of_files() == before

    def test_image_of_a_vm_is_left_to_the_vm(self, folder, names, tmp_path):
        folder.chain(*names[:2])
        home = tmp_path / "homes" / "web"
        home.mkdir(parents=True)
        index.record(index.Entry("1", "web", home, "qemu:///system", (str(folder / names[0]),)))
        before = folder.bytes_of_files()
        with pytest.raises(errors.Conflict, match="'web'"):
            folder.images.merge(folder / names[1])
        assert folder.bytes_of_files() == before

    def test_image_that_a_program_has_open_is_busy(self, folder, names):
        """Without any lock, as a QEMU that was told to do without has it."""
        folder.chain(*names[:2])
        before = folder.bytes_of_files()
        command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
        with (folder / names[0]).open("rb") as file:
            holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file.fileno()])
        with holder:
            holder.stdout.readline()
            with pytest.raises(errors.Conflict, match=str(holder.pid)):
                folder.images.merge(folder / names[1])
            holder.stdin.close()
        assert folder.bytes_of_files() == before

    def test_dry_run_changes_nothing(self, folder, names):
        folder.chain(*names[:2])
        before, plans = folder.bytes_of_files(), []
        reporter = hvmgr.Reporter(approve=plans.append, dry_run=True)
        with (
            hvmgr.Host.open("test:///default", root=folder.host.root, reporter=reporter) as host,
            pytest.raises(errors.Declined),
        ):
            host.images.merge(folder / names[1])
        assert [step.describe() for step in plans[0].steps()] == [
            f"merge {names[1]} into {folder / names[0]}",
            f"remove {folder / names[1]}",
        ]
        assert folder.bytes_of_files() == before


def test_image_that_qemu_has_open_is_busy(folder):
    folder.chain("a.qcow2", "b.qcow2")
    with storage_daemon.started() as daemon:
        daemon.open(folder / "b.qcow2", "qcow2", writable=True)
        with pytest.raises(errors.Conflict, match="in use"):
            folder.images.merge(folder / "b.qcow2")
    assert folder.names() == {"a.qcow2", "b.qcow2"}


def test_complete_image_has_nothing_to_be_merged_into(folder):
    folder.images.create(folder / "a.vhd", MIB)
    with pytest.raises(errors.UsageError, match="no differencing image"):
        folder.images.merge(folder / "a.vhd")


def test_stranger_is_no_ancestor(folder):
    folder.chain("a.vhd", "b.avhd")
    folder.images.create(folder / "x.vhd", 4 * MIB)
    with pytest.raises(errors.UsageError, match="no ancestor"):
        folder.images.merge(folder / "b.avhd", into=folder / "x.vhd")


def test_larger_qcow2_child_makes_its_base_grow(folder):
    shown = folder.chain("a.qcow2", "b.qcow2")
    folder.images.resize(folder / "b.qcow2", 6 * MIB)
    folder.images.merge(folder / "b.qcow2")
    assert folder.shown("a.qcow2") == shown[1] + bytes(2 * MIB)


def test_raw_base_takes_a_qcow2_child(folder):
    folder.raw("a.raw")
    data = folder.raw("new.raw", seed=5)
    folder.images.convert(folder / "new.raw", folder / "b.qcow2", ImageOptions(parent=folder / "a.raw"))
    folder.images.merge(folder / "b.qcow2")
    assert (folder / "a.raw").read_bytes() == data


def test_qcow2_is_not_merged_into_a_vhd(folder):
    """QEMU's own driver would write it, and a crash would leave it broken."""
    folder.images.create(folder / "a.vhd", 4 * MIB)
    folder.images.create(folder / "b.qcow2", options=ImageOptions(parent=folder / "a.vhd"))
    with pytest.raises(errors.Unsupported, match="cannot be merged"):
        folder.images.merge(folder / "b.qcow2")


def test_full_disk_in_the_middle_leaves_the_disk_as_it_was(small):
    shown = small.chain("a.vhd", "b.avhd", size=16 * MIB)
    (small / "new.raw").write_bytes(bytes(range(256)) * (16 * MIB // 256))
    small.images.convert(small / "new.raw", small / "c.avhd", ImageOptions(parent=small / "b.avhd"))
    with filled(small.path, 6 * MIB), pytest.raises(errors.NoSpace):
        small.images.merge(small / "c.avhd")
    assert small.shown("c.avhd") == (small / "new.raw").read_bytes()
    assert small.shown("a.vhd") == shown[0]
    # What reached the parent counts only when its bits are written, at the end of each block.
    assert {fault.code for fault in small.images.check(small / "c.avhd", chain=True).faults} <= {"F33", "F48"}
    assert small.names() == {"a.vhd", "b.avhd", "c.avhd", "new.raw"}
    small.images.merge(small / "c.avhd")
    assert small.images.check(small / "b.avhd", chain=True).is_sound
    assert small.shown("b.avhd") == (small / "new.raw").read_bytes()


def test_domain_of_libvirt_keeps_its_image(folder, connection, embed_root):
    folder.chain("a.vhd", "b.avhd")
    connection.define(
        "<domain type='qemu'><name>plain</name><memory>65536</memory><os><type>hvm</type></os><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='vpc'/><source file='{folder / 'a.vhd'}'/>"
        "<target dev='vda'/></disk></devices></domain>"
    )
    with hvmgr.Host.open(f"qemu:///embed?root={embed_root}", root=folder.host.root, wait_s=60) as host:
        with pytest.raises(errors.Conflict, match="'plain'"):
            host.images.merge(folder / "b.avhd")
        assert [user.vm for user in host.images.info(folder / "a.vhd").used_by] == ["plain", None]
    assert vhd.identify(folder / "b.avhd") is not None


def test_child_whose_parent_was_renamed_still_counts(folder):
    """Its words lead nowhere, its id does."""
    folder.chain("a.vhd", "b.avhd")
    folder.images.create(folder / "x.avhd", options=ImageOptions(parent=folder / "a.vhd"))
    (folder / "a.vhd").rename(folder / "renamed.vhd")
    before = folder.bytes_of_files()
    with pytest.raises(errors.Conflict, match=r"x\.avhd"):
        folder.images.merge(folder / "b.avhd", folders=[folder.path])
    with pytest.raises(errors.Conflict, match=r"avhd"):
        folder.images.resize(folder / "renamed.vhd", 8 * MIB)
    assert folder.bytes_of_files() == before


def test_children_of_a_copy_are_not_those_of_the_original(folder):
    shown = folder.chain("a.vhd", "b.avhd")
    folder.images.convert(folder / "a.vhd", folder / "copy.vhd", ImageOptions(keep_id=True))
    folder.images.create(folder / "x.avhd", options=ImageOptions(parent=folder / "copy.vhd"))
    folder.images.merge(folder / "b.avhd")
    assert folder.shown("a.vhd") == shown[1]
    assert folder.shown("x.avhd") == shown[0]
