"""Images as block devices: every format, every rule about who may write, and nothing left over of what dies."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors, vhd
from hvmgr.host import image_export, loop, pids
from hvmgr.operations import image_users
from hvmgr.storage import attachments, durable, start_guard
from tests.operations.images import attaching as help_
from tests.operations.rules import conftest as rules
from tests.storage.test_partitions import Memory, put_gpt, put_mbr

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _possible():
    help_.skip_where_impossible()
    with help_.taken_down():
        yield


@pytest.fixture
def said():
    return []


@pytest.fixture
def host(tmp_path, said):
    """A host without a libvirt, as far as an attachment is concerned: its VMs are in another test."""
    reporter = hvmgr.Reporter(notice=said.append)
    with hvmgr.Host(
        "qemu:///system?socket=/nonexistent/libvirt", tmp_path / "root", wait_s=5, reporter=reporter
    ) as host:
        yield host


def make(path, kind, size=8 * MIB):
    """An image with 64 KiB of ones at 1 MiB."""
    raw = path.with_suffix(".part")
    with raw.open("wb") as file:
        file.truncate(size)
        file.seek(MIB)
        file.write(b"\1" * 65536)
    fmt, _, options = kind.partition(" ")
    help_.run("qemu-img", "convert", "-f", "raw", "-O", fmt, *(("-o", options) if options else ()), raw, path)
    raw.unlink()
    return path


@pytest.mark.parametrize(
    "kind",
    ["raw", "qcow2", "vpc subformat=fixed,force_size=on", "vpc subformat=dynamic,force_size=on", "vhdx"],
)
def test_what_is_written_to_the_device_is_in_the_image(host, tmp_path, kind):
    path = make(tmp_path / "disk.img", kind)
    fmt = kind.partition(" ")[0]
    shown = host.attach_image(path)
    device = shown.attachment.device
    help_.require_node(device)
    assert shown.attachment.format == fmt.replace("vpc", "vhd")
    assert (shown.attachment.size, shown.attachment.read_only) == (8 * MIB, False)
    assert help_.read(device, MIB - 512, 1024) == bytes(512) + b"\1" * 512
    help_.write(device, 5 * MIB + 512, b"new" * 1000)
    help_.zero_out(device, MIB + 4096, 8192)  # QEMU's own export would leave the old bytes there
    assert help_.read(device, MIB + 4096, 8192) == bytes(8192)
    assert host.detach_image(device).path == str(path)
    expected = bytearray(8 * MIB)
    expected[MIB : MIB + 65536] = b"\1" * 4096 + bytes(8192) + b"\1" * (65536 - 12288)
    expected[5 * MIB + 512 : 5 * MIB + 3512] = b"new" * 1000
    assert help_.disk_of(path, fmt) == expected
    assert help_.is_clean()


def test_child_is_written_and_its_parent_never(host, tmp_path):
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    vhd.create(parent, 16 * MIB)
    with vhd.open_image(parent, writable=True) as image:
        image.write(3 * MIB, b"p" * 8192)
    vhd.create(child, 16 * MIB, kind=vhd.Kind.DIFFERENCING, parent=parent)
    before = hashlib.sha256(parent.read_bytes()).digest()
    shown = host.attach_image(child)
    device = shown.attachment.device
    assert shown.attachment.images == (str(child), str(parent))
    assert help_.read(device, 3 * MIB, 8192) == b"p" * 8192
    help_.write(device, 3 * MIB + 4096, b"c" * 4096)
    help_.write(device, 9 * MIB, b"far")
    with pytest.raises(errors.Conflict, match="attached already"):
        host.attach_image(parent)
    host.detach_image(child)
    assert hashlib.sha256(parent.read_bytes()).digest() == before
    with vhd.open_chain(child) as chain:
        found = bytearray(chain.size)
        chain.read_into(0, memoryview(found))
    assert found[3 * MIB : 3 * MIB + 8192] == b"p" * 4096 + b"c" * 4096
    assert found[9 * MIB : 9 * MIB + 4] == b"far\0"
    assert help_.is_clean()


def test_qcow2_on_a_dynamic_vhd_shows_both(host, tmp_path):
    make(tmp_path / "base.vhd", "vpc subformat=dynamic,force_size=on")
    top = tmp_path / "top.qcow2"
    help_.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.vhd", "-F", "vpc", top)
    device = host.attach_image(top).attachment.device
    help_.write(device, MIB, b"top")
    assert help_.read(device, MIB, 6) == b"top\1\1\1"
    host.detach_image(top)
    assert help_.disk_of(top, "qcow2")[MIB : MIB + 6] == b"top\1\1\1"


def test_raw_image_of_an_odd_length_works_in_place(host, tmp_path):
    path = tmp_path / "odd.raw"
    path.write_bytes(b"o" * 1000)
    device = host.attach_image(path).attachment.device
    assert help_.read(device, 0, 4096) == b"o" * 1000 + bytes(24)
    help_.write(device, 512, b"n" * 488)
    host.detach_image(path)
    assert path.read_bytes().rstrip(b"\0") == b"o" * 512 + b"n" * 488


@pytest.mark.parametrize("scheme", ["mbr", "gpt"])
def test_partitions_have_nodes(host, tmp_path, scheme):
    disk = Memory(16 * MIB)
    if scheme == "mbr":
        put_mbr(disk, [(7, 2048, 4096), (5, 8192, 16384)], boot=1)
        put_mbr(disk, [(0x83, 64, 2000)], at=8192 * 512)
        wanted = {1: (2048, 4096), 2: (8192, 16384), 5: (8192 + 64, 2000)}
    else:
        put_gpt(disk, [(2048, 6143, "one"), (8192, 20000, "two")])
        wanted = {1: (2048, 4096), 2: (8192, 20000 - 8192 + 1)}
    for start, _ in wanted.values():
        disk.data[start * 512 + 16384 : start * 512 + 16388] = b"here"
    path = tmp_path / "disk.raw"
    path.write_bytes(disk.data)
    shown = host.attach_image(path, read_only=True)
    found = {part.number: (part.start // 512, part.size // 512) for _, part in shown.partitions}
    assert found == wanted
    for node, part in shown.partitions:
        help_.require_node(node)
        if part.type != "05":  # of an extended partition Linux shows two sectors
            assert help_.read(node, 16384, 4) == b"here"
    assert [one.partitions for one in host.attachments()] == [shown.partitions]
    node = shown.partitions[0][0]
    assert host.detach_image(node).path == str(path)
    plain = tmp_path / "plain.raw"
    plain.write_bytes(bytes(MIB))
    device = host.attach_image(plain).attachment.device
    assert loop.partitions(Path(device)) == []


def test_file_system_works_and_a_mounted_one_is_not_detached(host, tmp_path, require_program):
    require_program("mke2fs")
    if "ext4" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no ext4")
    path = make(tmp_path / "disk.vhd", "vpc subformat=dynamic,force_size=on", 32 * MIB)
    device = host.attach_image(path).attachment.device
    help_.run("mke2fs", "-q", "-F", "-t", "ext4", device)
    place = tmp_path / "mounted"
    place.mkdir()
    # A namespace of its own: what is mounted here must not be seen, and kept, by a libvirtd of another test.
    script = (
        f"mount {device} {place} && echo data > {place}/file && {{ {sys.executable} -m hvmgr image detach {device}; "
    )
    script += f"echo $?; }} && umount {place}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "4\n"
    assert f"mounted at {place}" in done.stderr
    assert f"umount '{place}'" in done.stderr
    assert host.attachments()[0].is_alive
    host.detach_image(device)
    raw = tmp_path / "raw"
    help_.run("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw)
    assert "data" in help_.run("debugfs", "-R", "cat file", raw)
    help_.run("e2fsck", "-fn", raw)


def test_lost_write_is_told(host, tmp_path):
    """The image's file system fills up behind the back of whoever writes to the device."""
    place = tmp_path / "full"
    place.mkdir()
    hvmgr_ = f"{sys.executable} -m hvmgr -c qemu:///system?socket=/nonexistent/libvirt image"
    script = f"""mount -t tmpfs -o size=1M none {place} && qemu-img create -q -f qcow2 {place}/disk 16M || exit 1
        device=$({hvmgr_} attach {place}/disk | sed 's/.* as //')
        head -c 4M /dev/urandom > $device
        {hvmgr_} detach $device
        echo $?
        mount -o remount,size=32M {place}
        {hvmgr_} detach $device > /dev/null && umount {place}"""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "8\n"
    assert "not all that was written" in done.stderr
    assert help_.is_clean()


def test_open_device_is_not_detached_and_stays(host, tmp_path):
    disk = Memory(4 * MIB)
    put_mbr(disk, [(7, 2048, 4096)])
    path = tmp_path / "disk.raw"
    path.write_bytes(disk.data)
    shown = host.attach_image(path)
    with pytest.MonkeyPatch.context() as patch, open(shown.partitions[0][0], "rb"):
        patch.setattr(loop, "_END_S", 0.2)
        with pytest.raises(errors.Conflict, match=r"has .* open"):
            host.detach_image(path)
    assert host.attachments() == [shown]
    help_.write(shown.partitions[0][0], 0, b"still")
    host.detach_image(path)
    assert path.read_bytes()[MIB : MIB + 5] == b"still"


class TestReadOnly:
    def test_wish_is_kept(self, host, tmp_path):
        path = make(tmp_path / "disk.qcow2", "qcow2")
        before = path.read_bytes()
        device = host.attach_image(path, read_only=True).attachment.device
        with pytest.raises(PermissionError):
            help_.write(device, 0, b"x" * 512)
        host.detach_image(device)
        assert path.read_bytes() == before

    def test_image_with_a_child_is_read_only(self, host, tmp_path, said):
        make(tmp_path / "base.qcow2", "qcow2")
        child = tmp_path / "child.qcow2"
        help_.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", child)
        one = host.attach_image(tmp_path / "base.qcow2").attachment
        assert one.read_only
        assert one.reason == f"{child} stands on it"
        assert said == [f"{one.path} is attached read-only: {one.reason}"]

    def test_vhd_with_a_child_is_read_only(self, host, tmp_path):
        vhd.create(tmp_path / "p.vhd", 4 * MIB)
        vhd.create(tmp_path / "c.vhd", 4 * MIB, kind=vhd.Kind.DIFFERENCING, parent=tmp_path / "p.vhd")
        assert host.attach_image(tmp_path / "p.vhd").attachment.reason == f"{tmp_path / 'c.vhd'} stands on it"

    def test_mode_is_respected(self, host, tmp_path):
        path = make(tmp_path / "disk.raw", "raw")
        path.chmod(0o440)
        assert host.attach_image(path).attachment.read_only


class TestRefusals:
    def test_twice(self, host, tmp_path):
        path = make(tmp_path / "disk.raw", "raw")
        device = host.attach_image(path).attachment.device
        with pytest.raises(errors.Conflict, match=f"attached already, as {device}"):
            host.attach_image(path, read_only=True)

    def test_image_that_another_process_writes(self, host, tmp_path):
        path = make(tmp_path / "disk.vhd", "vpc subformat=dynamic,force_size=on")
        words = ["qemu-io", "-f", "vpc", path]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            other.stdin.write("read 0 512\n")
            other.stdin.flush()
            assert "read 512" in other.stdout.readline()
            with pytest.raises(errors.Conflict, match=f"in use by process {other.pid}"):
                host.attach_image(path)
            other.communicate("quit\n", timeout=60)
        assert help_.is_clean()
        host.attach_image(path)
        done = subprocess.run([*words, "-c", "write 0 512"], capture_output=True, text=True, timeout=60, check=False)
        assert "lock" in done.stderr + done.stdout

    @pytest.mark.parametrize("kind", ["raw", "qcow2"])
    def test_nobody_writes_what_is_attached_read_only(self, host, tmp_path, kind):
        path = make(tmp_path / "disk", kind)
        host.attach_image(path, read_only=True)
        words = ["qemu-io", "-f", kind, "-c", "write 0 512", path]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert "lock" in done.stderr + done.stdout

    @pytest.mark.parametrize(
        ("make_it", "error"),
        [
            (lambda path: None, errors.NotFound),
            (lambda path: path.mkdir(), errors.UsageError),
            (lambda path: path.write_bytes(b"QFI\xfb" + b"\xff" * 2000), errors.HvmgrError),
            (lambda path: path.write_bytes(b"KDMV" + bytes(2000)), errors.Unsupported),
            (lambda path: path.write_bytes(b"vhdxfile" + bytes(2000)), errors.HvmgrError),
            (lambda path: path.write_bytes(b"conectix" + bytes(2000)), errors.HvmgrError),
        ],
    )
    def test_what_is_no_image(self, host, tmp_path, make_it, error):
        make_it(tmp_path / "x")
        with pytest.raises(error):
            host.attach_image(tmp_path / "x")
        assert help_.is_clean()

    def test_child_whose_parent_is_gone(self, host, tmp_path):
        vhd.create(tmp_path / "p.vhd", 4 * MIB)
        vhd.create(tmp_path / "c.vhd", 4 * MIB, kind=vhd.Kind.DIFFERENCING, parent=tmp_path / "p.vhd")
        (tmp_path / "p.vhd").unlink()
        with pytest.raises(errors.NotFound, match=r"p\.vhd"):
            host.attach_image(tmp_path / "c.vhd")
        assert help_.is_clean()

    def test_what_is_not_attached(self, host):
        with pytest.raises(errors.NotFound, match="not attached"):
            host.detach_image("/dev/loop0p9x")

    def test_dry_run_changes_nothing(self, host, tmp_path):
        path = make(tmp_path / "disk.raw", "raw")
        host.reporter = hvmgr.Reporter(dry_run=True, approve=lambda _: False)
        with pytest.raises(errors.Declined):
            host.attach_image(path)
        assert help_.is_clean()


# --- what dies ------------------------------------------------------------------------------------------------------


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


class TestLeftOver:
    def test_dead_daemon_is_listed_and_cleaned_by_the_next_command(self, host, tmp_path, said):
        path = make(tmp_path / "disk.vhd", "vpc subformat=dynamic,force_size=on")
        one = host.attach_image(path).attachment
        help_.write(one.device, 0, b"lost")
        daemon, server = sorted(one.processes, key=lambda one: b"block_server" in cmdline(one[0]))
        os.kill(daemon[0], signal.SIGKILL)
        pids.end(*daemon, timeout_s=60)
        assert pids.is_running(*server)
        assert loop.backing(Path(one.device)) is not None
        (shown,) = host.attachments()
        assert not shown.is_alive
        other = make(tmp_path / "other.raw", "raw")
        host.attach_image(other)
        assert [shown.attachment.path for shown in host.attachments()] == [str(other)]
        assert any("broken off" in sentence for sentence in said)
        assert not loop.shows_nothing_any_more(Path(one.device), one.life)
        host.detach_image(other)
        assert help_.is_clean()

    def test_record_of_an_earlier_start_of_the_host_goes(self, host, tmp_path):
        path = make(tmp_path / "disk.raw", "raw")
        one = attachments.Attachment(
            "old", str(path), "raw", False, (str(path),), "/run/hvmgr/none", "another boot", "2026", device="/dev/loop0"
        )
        attachments.write(one)
        assert attachments.users([str(path)]) == {}
        host.attach_image(path)
        host.detach_image(path)
        assert help_.is_clean()

    def test_image_that_went_away_is_told(self, host, tmp_path):
        path = make(tmp_path / "disk.raw", "raw")
        host.attach_image(path)
        path.rename(tmp_path / "moved.raw")
        with pytest.raises(errors.HostFailed, match="removed or replaced"):
            host.detach_image(path)
        assert help_.is_clean()

    def test_device_that_others_detached_goes(self, host, tmp_path):
        path = make(tmp_path / "disk.raw", "raw")
        device = host.attach_image(path).attachment.device
        help_.write(device, 0, b"written")
        help_.run("losetup", "-d", device)
        host.detach_image(path)
        assert path.read_bytes()[:7] == b"written"
        assert help_.is_clean()


# In the order of an attachment and its end: the child is killed before each of them.
ACTS = [
    (attachments, "write"),
    (image_export, "serve"),
    (image_export, "start"),
    (loop, "attach"),
    (loop, "set_partitions"),
    (loop, "detach"),
    (image_export, "end"),
    (durable, "remove_folder"),
    (attachments, "remove"),
]


def killed_before(number, act):
    """Runs ``act`` in a forked child that is killed before its ``number``-th act; False when it came to its end."""
    pid = os.fork()
    if pid == 0:
        count = 0
        signal.alarm(120)  # it never hangs for ever
        image_users._domains = lambda _: {}
        try:

            def counted(real):
                def act(*words, **more):
                    nonlocal count
                    count += 1
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*words, **more)

                return act

            for module, name in ACTS:
                setattr(module, name, counted(getattr(module, name)))
            act()
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_attach_leaves_nothing(host, tmp_path):
    path, other = tmp_path / "disk.vhd", make(tmp_path / "other.raw", "raw")
    make(path, "vpc subformat=dynamic,force_size=on")
    before, number = path.read_bytes(), 1
    while killed_before(number, lambda: host.attach_image(path)):
        assert [one for one in host.attachments() if one.is_alive] == []
        host.detach_image(host.attach_image(other).attachment.device)
        assert help_.is_clean(), number
        assert path.read_bytes() == before
        number += 1
    assert number == 8
    host.detach_image(path)


def test_killed_detach_is_completed_and_nothing_is_lost(host, tmp_path):
    path, other = tmp_path / "disk.vhd", make(tmp_path / "other.raw", "raw")
    make(path, "vpc subformat=dynamic,force_size=on")
    number = 1
    while True:
        device = host.attach_image(path).attachment.device
        help_.write(device, 512 * number, bytes([number]) * 512)
        if not killed_before(number, lambda device=device: host.detach_image(device)):
            break
        if number > 1:
            assert [one for one in host.attachments() if one.is_alive] == []
            host.detach_image(host.attach_image(other).attachment.device)
        else:
            host.detach_image(path)  # nothing had been done
        assert help_.is_clean(), number
        assert help_.disk_of(path, "vpc", length=512 * (number + 1))[512 * number :] == bytes([number]) * 512
        number += 1
    assert number == 6
    assert help_.is_clean()


# --- VMs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path_factory):
    """A folder that QEMU's user can pass."""
    yield from rules.place.__wrapped__()


@pytest.fixture
def bench(connection, place):
    """A host with VMs."""
    yield from rules.bench.__wrapped__(connection.uri, place)


class TestVMs:
    def test_working_image_of_a_vm_that_is_off(self, bench):
        vm = bench.make(4)
        path = bench.disk(vm)
        device = bench.host.attach_image(path).attachment.device
        for act in (vm.start, vm.create_snapshot, vm.delete):
            with pytest.raises(errors.Conflict, match=f"attached as {device}") as refused:
                act()
            assert refused.value.hint == f"hvmgr image detach {device}"
        assert [(one.code, one.repair) for one in start_guard.examine(vm.home.present())] == [
            ("image-attached", f"hvmgr image detach {device}")
        ]
        help_.write(device, 0, b"by hand")
        bench.host.detach_image(path)
        assert help_.disk_of(path, "qcow2")[:7] == b"by hand"
        vm.create_snapshot("one")
        bench.check(vm)

    def test_attached_image_gets_no_vm(self, bench):
        path = bench.image("disk.raw", fmt="raw")
        device = bench.host.attach_image(path).attachment.device
        with pytest.raises(errors.Conflict, match=f"attached as {device}"):
            bench.make(bench.in_place(path))

    def test_frozen_image_is_read_only_and_not_merged_away(self, bench):
        vm = bench.make(4)
        bench.write(vm, 1)
        vm.create_snapshot("one")
        bench.write(vm, 2, MIB)
        frozen = vm.create_snapshot("two").disks["hda"]
        one = bench.host.attach_image(frozen).attachment
        assert one.reason == "it is frozen: the snapshot 'two' of 'web' needs it unchanged"
        vm.snapshot("two").delete()
        assert Path(frozen).exists()
        assert help_.read(one.device, MIB, 4) == b"\2" * 4
        bench.host.detach_image(frozen)
        vm.merge()
        assert not Path(frozen).exists()
        bench.check(vm)

    def test_running_vm(self, bench):
        vm = bench.make(4)
        vm.create_snapshot("one", type="disk-only")
        frozen = vm.snapshot("one").disks["hda"]
        assert bench.host.attach_image(frozen).attachment.read_only
        bench.start(vm)  # what it only reads may be attached
        bench.host.detach_image(frozen)
        for read_only in (False, True):
            with pytest.raises(errors.Conflict, match="belongs to the VM 'web', which runs"):
                bench.host.attach_image(bench.disk(vm), read_only=read_only)
        assert bench.host.attach_image(frozen).attachment.read_only
        bench.host.detach_image(frozen)
        vm.stop(force=True)

    def test_image_of_a_vm_that_is_not_hvmgrs(self, bench):
        vm = bench.make(4)
        vm.release(flatten=True)
        path = bench.disk(vm)
        assert [user.use for user in image_users.of(bench.host, Path(path))] == [image_users.Use.OFF]
        one = bench.host.attach_image(path).attachment
        assert not one.read_only

    def test_doctor_finds_and_cleans_what_is_left(self, bench):
        path = bench.image("disk.raw", fmt="raw")
        one = bench.host.attach_image(path).attachment
        assert [found for found in bench.host.doctor() if found.code == "attachment-left"] == []
        image_export.end(Path(one.folder))
        (found,) = [found for found in bench.host.doctor() if found.code == "attachment-left"]
        assert found.where == str(path)
        assert loop.shows_nothing_any_more(Path(one.device), one.life)
        assert "attachment-left" in {str(done.finding.code) for done in bench.host.repair()}
        assert not loop.shows_nothing_any_more(Path(one.device), one.life)
        assert help_.is_clean()
