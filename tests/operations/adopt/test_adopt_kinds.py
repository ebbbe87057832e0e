"""What kinds of domains and disks are adopted, and what is refused by name with nothing changed."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host.hypervisor import Connection
from hvmgr.storage import index

pytestmark = pytest.mark.libvirtd


@contextlib.contextmanager
def unchanged(place, *names):
    """Nothing at all is another afterwards."""
    before = place.state_of(*names)
    homes = sorted(place.folder.glob("homes/*/**"))
    yield
    assert place.state_of(*names) == before
    assert sorted(place.folder.glob("homes/*/**")) == homes


def refusal(place, name, error, match, **options):
    with unchanged(place, name), pytest.raises(error, match=match) as failure:
        place.host.adopt(name, hvmgr.AdoptOptions(**options))
    return failure.value


class TestDomain:
    def test_off_with_one_disk(self, place):
        base = place.image("a.qcow2", fill=1)
        place.define("web", ("vda", "qcow2", base))
        before = place.virsh("dumpxml", "web")
        vm = place.host.adopt("web")
        assert place.now(vm)["vda"][0] == 1
        assert vm.now().disks == {"vda": str(base)}
        assert base.stat().st_mode & 0o777 == 0o644
        place.check(vm)
        lines = set(place.virsh("dumpxml", "web").splitlines()) ^ set(before.splitlines())
        assert all("metadata" in line or "hvmgr" in line for line in lines), lines
        one = vm.create_snapshot("one")
        assert base.stat().st_mode & 0o777 == 0o400
        place.write("web", 2, 1)
        assert place.bytes_of(base, "qcow2")[:2] == [1, 0]
        one.delete()
        assert base.exists()

    def test_running_one_runs_on(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        place.virsh("start", "web")
        place.write("web", 1)
        live = place.virsh("dumpxml", "web")
        vm = place.host.adopt("web")
        assert place.virsh("dumpxml", "web") == live
        place.write("web", 2, 1)
        vm.create_snapshot("one")
        place.write("web", 3, 2)
        assert place.now(vm)["vda"][:3] == [1, 2, 3]
        assert place.seen(vm.snapshot("one"))["vda"][:3] == [1, 2, 0]

    def test_by_id(self, place):
        domain = place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        assert place.host.adopt(domain.uuid).name == "web"

    def test_unknown_name_offers_near_ones(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        with pytest.raises(errors.NotFound) as failure:
            place.host.adopt("wbe")
        assert "web" in failure.value.hint

    def test_transient(self, place):
        file = place.folder / "web.xml"
        file.write_text(place.xml("web", [("vda", "qcow2", place.image("a.qcow2"))]))
        place.virsh("create", file)
        with pytest.raises(errors.Conflict, match="web is transient") as failure:
            place.host.adopt("web")
        assert "virsh define web.xml" in failure.value.hint
        assert not (place.folder / "homes").exists()

    def test_saved_one_stays_saved(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        place.virsh("start", "web")
        place.write("web", 1)
        place.virsh("managedsave", "web")
        vm = place.host.adopt("web")
        assert str(vm.state()) == "saved"
        place.virsh("start", "web")
        place.write("web", 2, 1)
        assert place.now(vm)["vda"][:2] == [1, 2]
        vm.create_snapshot("one")

    def test_saved_one_with_other_disks(self, place):
        base = place.image("a.qcow2")
        other = place.image("other.qcow2")
        place.define("web", ("vda", "qcow2", base))
        place.virsh("start", "web")
        place.virsh("managedsave", "web")
        place.edit("web", lambda text: text.replace(str(base), str(other)))
        error = refusal(place, "web", errors.Conflict, "managed save of web has other disks")
        assert "managedsave-remove" in error.hint

    def test_autostart_is_kept(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        place.virsh("autostart", "web")
        place.host.adopt("web")
        assert "enable" in next(line for line in place.virsh("dominfo", "web").splitlines() if "Autostart" in line)

    def test_nvram_stays_and_each_snapshot_gets_a_copy(self, place):
        nvram = place.folder / "web_VARS.fd"
        nvram.write_bytes(b"variables")
        firmware = place.folder / "code.fd"
        firmware.write_bytes(b"code")
        loader = f"<loader readonly='yes' type='pflash'>{firmware}</loader><nvram>{nvram}</nvram>"
        place.define(
            "web", ("vda", "qcow2", place.image("a.qcow2")), os_more=loader, top="<features><acpi/></features>"
        )
        for name in ("one", "two"):
            place.virsh("snapshot-create-as", "web", name, "--disk-only")
        vm = place.host.adopt("web")
        nvram.write_bytes(b"later")
        assert vm.home.present().nvram == nvram
        for one in vm.snapshots():
            assert vm.home.snapshot(one.id).nvram.read_bytes() == b"variables"
        vm.snapshot("one").apply()
        assert vm.home.present().nvram.read_bytes() == b"variables"
        vm.undo()
        assert vm.home.present().nvram.read_bytes() == b"later"

    def test_tpm_state_is_copied_to_each_snapshot(self, place, monkeypatch):
        """Without a copy, an apply would take it for a TPM that had no state yet."""
        state = place.folder / "swtpm"
        monkeypatch.setattr(Connection, "tpm_folder", lambda _self, _uuid: state)
        state.mkdir()
        (state / "tpm2-00.permall").write_bytes(b"keys")
        tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")), devices=tpm)
        place.virsh("snapshot-create-as", "web", "one", "--disk-only")
        vm = place.host.adopt("web")
        assert any("copy of today's" in one for one in place.said)
        (state / "tpm2-00.permall").write_bytes(b"later")
        vm.snapshot("one").apply()
        assert (state / "tpm2-00.permall").read_bytes() == b"keys"
        vm.undo()
        assert (state / "tpm2-00.permall").read_bytes() == b"later"

    def test_host_device_is_said(self, place):
        device = (
            "<hostdev mode='subsystem' type='usb'><source startupPolicy='optional'><vendor id='0x1234'/>"
            "<product id='0xbeef'/></source></hostdev><controller type='usb' index='1' model='qemu-xhci'/>"
        )
        text = place.xml("web", [("vda", "qcow2", place.image("a.qcow2"))], devices=device)
        file = place.folder / "web.xml"
        file.write_text(text.replace("<controller type='usb' model='none'/>", "").replace("index='1'", "index='0'"))
        place.virsh("define", file)
        place.host.adopt("web")
        assert any("a device of the host" in one and "memory" in one for one in place.said)

    def test_libvirts_bitmaps(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        place.virsh("start", "web")
        place.virsh("checkpoint-create-as", "web", "backup-1")
        with pytest.raises(errors.Unsupported, match="backup-1") as failure:
            place.host.adopt("web")
        assert failure.value.hint == "virsh checkpoint-delete web backup-1"
        place.virsh("checkpoint-delete", "web", "backup-1")
        place.host.adopt("web")

    def test_block_job(self, place):
        base = place.image("a.qcow2")
        place.define("web", ("vda", "qcow2", base))
        place.virsh("start", "web")
        place.virsh("blockcopy", "web", "vda", place.folder / "copy.qcow2", "--transient-job")
        with pytest.raises(errors.Busy):
            place.host.adopt("web")


class TestManaged:
    def test_managed_already(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        vm = place.host.adopt("web")
        with unchanged(place, "web"), pytest.raises(errors.Conflict, match="managed by hvmgr already") as failure:
            place.host.adopt("web")
        assert failure.value.facts["home"] == str(vm.path)

    def test_managed_under_another_root(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        place.host.adopt("web")
        other = place.open_host("elsewhere")
        with pytest.raises(errors.Conflict, match="managed by hvmgr already"):
            other.adopt("web")
        assert other.adoptable() == []
        other.close()

    def test_mark_of_a_home_that_is_gone(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        vm = place.host.adopt("web")
        vm.path.rename(place.folder / "away")
        with pytest.raises(errors.Conflict, match="where none is") as failure:
            place.host.adopt("web")
        line = failure.value.hint.partition(": ")[2]
        place.virsh(*line.removeprefix("virsh ").split())
        assert place.host.adopt("web").name == "web"

    def test_home_of_another_vm(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        place.define("db", ("vda", "qcow2", place.image("b.qcow2")))
        vm = place.host.adopt("web")
        refusal(place, "db", errors.Conflict, "it is the home of the VM 'web'", home=vm.path)

    def test_home_that_is_not_empty(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        refusal(place, "web", errors.Conflict, "not empty", home=place.folder)

    def test_own_home_elsewhere_is_found_again(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        vm = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "own"))
        assert place.host.vm("web").path == vm.path == place.folder / "own"
        assert not any("file system" in one for one in place.said)

    def test_home_on_another_file_system_is_said(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        with hvmgr.Host.open(
            place.uri, root="/dev/shm/hvmgr-homes", reporter=hvmgr.Reporter(notice=place.said.append, dry_run=True,
                                                                             approve=lambda _: False)
        ) as host, pytest.raises(errors.Declined):  # fmt: skip
            host.adopt("web")
        assert any("another file system" in one and "--home" in one for one in place.said)
        assert not Path("/dev/shm/hvmgr-homes").exists()

    def test_adoptable(self, place):
        for name in ("web", "db"):
            place.define(name, ("vda", "qcow2", place.image(f"{name}.qcow2")))
        assert place.host.adoptable() == ["db", "web"]
        place.host.adopt("web")
        assert place.host.adoptable() == ["db"]


class TestDisks:
    def test_chain_without_stated_format(self, place):
        base, top = place.image("a.qcow2", fill=1), place.folder / "top.qcow2"
        place.image("top.qcow2", below=base)
        place.define("web", ("vda", "qcow2", top))
        header = bytearray(top.read_bytes())
        at = header.find(b"\xe2\x79\x2a\xca")
        header[at : at + 4] = b"\x12\x34\x56\x78"  # an extension that nobody knows
        top.write_bytes(header)
        error = refusal(place, "web", errors.Unsupported, "does not state the format")
        assert "qemu-img rebase -u" in error.hint

    RAW_BELOW = "<backingStore type='file'><format type='raw'/><source file='{base}'/><backingStore/></backingStore>"
    OTHER_BELOW = "<backingStore type='file'><format type='qcow2'/><source file='{other}'/></backingStore>"

    @pytest.mark.parametrize("more", ["<backingStore/>", RAW_BELOW, OTHER_BELOW])
    def test_stated_chain_that_the_header_contradicts(self, place, more):
        base, other = place.image("a.qcow2", fill=1), place.image("other.qcow2", fill=2)
        top = place.image("top.qcow2", below=base)
        place.define("web", ("vda", "qcow2", top), disk_more={"vda": more.format(base=base, other=other)})
        error = refusal(place, "web", errors.Conflict, r"by its XML .*, by its header on .*a\.qcow2 \(qcow2\)")
        assert "virsh edit web" in error.hint

    def test_stated_chain_that_the_header_confirms(self, place):
        base = place.image("a.qcow2", fill=1)
        top = place.image("top.qcow2", below=base)
        more = f"<backingStore type='file'><format type='qcow2'/><source file='{base}'/><backingStore/></backingStore>"
        place.define("web", ("vda", "qcow2", top), disk_more={"vda": more})
        vm = place.host.adopt("web")
        assert "<backingStore" not in place.virsh("dumpxml", "web")
        assert place.now(vm)["vda"][0] == 1

    def test_chain_with_a_missing_file(self, place):
        base = place.image("a.qcow2", fill=1)
        top = place.image("top.qcow2", below=base)
        place.define("web", ("vda", "qcow2", top))
        base.unlink()
        refusal(place, "web", errors.Corrupt, r"disk vda of web: .*a\.qcow2 is missing")

    def test_data_file(self, place):
        path = place.folder / "a.qcow2"
        place.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={place.folder}/data", path, "1M")
        place.define("web", ("vda", "qcow2", path))
        refusal(place, "web", errors.Unsupported, "keeps its data in another file")

    def test_encrypted_image(self, place):
        path = place.folder / "a.qcow2"
        place.run("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x",
                  "-o", "encrypt.format=aes,encrypt.key-secret=s", path, "1M")  # fmt: skip
        place.define("web", ("vda", "qcow2", path))
        refusal(place, "web", errors.Unsupported, "is encrypted")

    def test_encryption_in_the_xml(self, place):
        secret = "<encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption>".format(
            "0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f"
        )
        place.define("web", ("vda", "raw", place.image("a.raw", "raw")), disk_more={"vda": secret})
        refusal(place, "web", errors.Unsupported, "has <encryption>")

    NETWORK = (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='x'>"
        "<host name='127.0.0.1' port='1'/></source><target dev='vdb' bus='virtio'/></disk>"
    )

    def test_network_disk_is_refused_or_left_out(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")), self.NETWORK)
        error = refusal(place, "web", errors.Unsupported, "disk vdb of web is of the type network")
        assert "--exclude-disk vdb" in error.hint
        vm = place.host.adopt("web", hvmgr.AdoptOptions(exclude_disks=("vdb",)))
        vm.create_snapshot("one")
        vm.snapshot("one").apply()
        assert "protocol='nbd'" in place.virsh("dumpxml", "web")
        assert vm.now().disks.keys() == {"vda"}
        place.check(vm)

    @pytest.mark.parametrize(("mark", "word"), [("<shareable/>", "shareable"), ("<transient/>", "transient")])
    def test_disk_that_cannot_be_frozen(self, place, mark, word):
        place.define("web", ("vda", "raw", place.image("a.raw", "raw")), disk_more={"vda": mark})
        refusal(place, "web", errors.Unsupported, f"disk vda of web is {word}")
        assert place.host.adopt("web", hvmgr.AdoptOptions(exclude_disks=("vda",))).now().disks == {}

    @pytest.mark.parametrize("more", ["", "<readonly/>"], ids=["left-out", "read-only"])
    def test_differencing_vhd_is_refused_in_any_drive(self, place, more):
        """QEMU would show zeros for what its parent holds, and libvirt would not say a word."""
        place.host.images.create(place.folder / "base.vhd", 4 << 20)
        options = hvmgr.ImageOptions(parent=place.folder / "base.vhd")
        child = place.host.images.create(place.folder / "child.vhd", options=options).path
        disks = [("vda", "qcow2", place.image("a.qcow2")), ("vdb", "vpc", child)]
        place.define("web", *disks, disk_more={"vdb": more})
        error = refusal(place, "web", errors.Unsupported, r"differencing VHD of base\.vhd", exclude_disks=("vdb",))
        assert f"image convert {child}" in error.hint

    def test_left_out_disk_of_a_running_vm(self, place):
        place.define("web", *[(slot, "qcow2", place.image(f"{slot}.qcow2")) for slot in ("vda", "vdb")])
        place.virsh("start", "web")
        vm = place.host.adopt("web", hvmgr.AdoptOptions(exclude_disks=("vdb",)))
        assert vm.create_snapshot("one", type=hvmgr.SnapshotType.DISK_ONLY).disks.keys() == {"vda"}
        with pytest.raises(errors.Conflict, match="vdb is writable and takes no part"):
            vm.create_snapshot("two")
        place.write("web", 1, 1, slot="vdb")
        assert place.bytes_of(place.folder / "vdb.qcow2", "qcow2")[1] == 1

    def test_disk_that_is_not_there_cannot_be_left_out(self, place):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
        error = refusal(place, "web", errors.NotFound, "web has no disk vdz", exclude_disks=("vdz",))
        assert error.hint == "it has vda"

    def test_volume_of_a_pool_becomes_its_file(self, place):
        path = place.image("a.qcow2", fill=1)
        place.virsh("pool-define-as", "disks", "dir", "--target", place.folder)
        place.virsh("pool-start", "disks")
        disk = (
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
            "<source pool='disks' volume='a.qcow2'/><target dev='vda' bus='virtio'/></disk>"
        )
        try:
            place.define("web", disk)
            vm = place.host.adopt("web")
            assert vm.now().disks == {"vda": str(path)}
            vm.create_snapshot("one")
            place.check(vm)
            place.define("db", disk.replace("a.qcow2", "none.qcow2"))
            refusal(place, "db", errors.Unsupported, r"disk vda of db is the volume 'none\.qcow2' of the pool 'disks'")
        finally:
            place.virsh("pool-destroy", "disks")
            place.virsh("pool-undefine", "disks")

    def test_one_file_in_two_slots(self, place):
        path = place.image("a.raw", "raw")
        place.define("web", ("vda", "raw", path), ("vdb", "raw", path))
        refusal(place, "web", errors.Conflict, "disks vda and vdb of web are one file")

    def test_read_only_file_system(self, place):
        path = place.image("sub.qcow2")
        mount = place.folder / "mount"
        mount.mkdir()
        place.run("mount", "--bind", place.folder, mount)
        try:
            place.run("mount", "-o", "remount,bind,ro", mount)
            place.define("web", ("vda", "qcow2", mount / path.name))
            with pytest.raises(errors.Conflict, match=r"sub\.qcow2 cannot be written"):
                place.host.adopt("web")
            with pytest.raises(errors.HostFailed, match="read-only file system"):
                place.host.adopt("web", hvmgr.AdoptOptions(home=mount / "home"))
        finally:
            place.run("umount", "-l", mount)


class TestOthers:
    def test_disk_that_another_vm_writes(self, place):
        path = place.image("a.qcow2")
        for name in ("web", "db"):
            place.define(name, ("vda", "qcow2", path))
        error = refusal(place, "web", errors.Conflict, "is written by the VM 'db' as well")
        assert error.exit_code == 4

    def test_disk_that_another_vm_stands_on(self, place):
        path = place.image("a.qcow2")
        place.define("web", ("vda", "qcow2", path))
        place.define("db", ("vda", "qcow2", place.image("top.qcow2", below=path)))
        refusal(place, "web", errors.Conflict, "which db stands on")

    def test_base_that_another_vm_writes(self, place):
        path = place.image("a.qcow2")
        place.define("web", ("vda", "qcow2", place.image("top.qcow2", below=path)))
        place.define("db", ("vda", "qcow2", path))
        refusal(place, "web", errors.Conflict, "is written by the VM 'db' as well")

    def test_shared_base_is_counted(self, place):
        base = place.image("a.qcow2", fill=1)
        for name in ("web", "db", "app"):
            place.define(name, ("vda", "qcow2", place.image(f"{name}.qcow2", below=base)))
        vms = [place.host.adopt(name) for name in ("web", "db", "app")]
        for number, vm in enumerate(vms, 2):
            place.write(vm.name, number, 1)
            vm.create_snapshot("one")
            place.write(vm.name, number + 16, 2)
        vms[0].snapshot("one").apply()
        vms[1].snapshot("one").delete()
        vms[2].delete()
        assert place.now(vms[0])["vda"][:3] == [1, 2, 0]
        assert place.now(vms[1])["vda"][:3] == [1, 3, 19]
        assert place.bytes_of(base, "qcow2")[:2] == [1, 0]
        known = {entry.name: entry.outside for entry in index.entries()}
        assert str(base) in known["web"]

    def test_images_of_branches_are_counted(self, place):
        """Also those that only a snapshot needs, and the present does not."""
        base = place.image("a.qcow2")
        place.define("web", ("vda", "qcow2", base))
        place.virsh("snapshot-create-as", "web", "one", "--disk-only")
        place.virsh("snapshot-create-as", "web", "two", "--disk-only")
        branch = place.image("branch.qcow2", below=base)
        place.edit("web", lambda text: text.replace(str(place.folder / "a.two"), str(branch)))
        place.host.adopt("web")
        (entry,) = index.entries()
        assert {Path(path).name for path in entry.outside} == {"a.qcow2", "a.one", "branch.qcow2"}

    @pytest.fixture
    def volume(self, place):
        """A disk that is named by pool and volume."""
        place.virsh("pool-define-as", "disks", "dir", "--target", place.folder)
        place.virsh("pool-start", "disks")
        yield (
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
            "<source pool='disks' volume='{}'/><target dev='vda' bus='virtio'/></disk>"
        ).format
        place.virsh("pool-destroy", "disks")
        place.virsh("pool-undefine", "disks")

    @pytest.mark.parametrize("how", ["by its volume", "left out", "until it stops"])
    def test_base_that_another_vm_writes_is_seen_whatever_it_is_called(self, place, volume, how):
        base, other = place.image("a.qcow2", fill=1), place.image("b.qcow2")
        place.virsh("pool-refresh", "disks")
        place.define("web", ("vda", "qcow2", place.image("top.qcow2", below=base)))
        if how == "by its volume":
            place.define("db", volume(base.name))
        elif how == "left out":
            disk = place.xml("db", [("vda", "qcow2", base)])
            disk = disk[disk.index("<disk") : disk.index("</disk>") + len("</disk>")]
            place.define("db", disk.replace("device='disk'", "device='disk' snapshot='no'"))
        else:
            place.define("db", ("vda", "qcow2", base))
            place.virsh("start", "db")
            place.edit("db", lambda text: text.replace(str(base), str(other)))
        refusal(place, "web", errors.Conflict, "is written by the VM 'db' as well")

    def test_disk_that_a_volume_stands_on(self, place, volume):
        path = place.image("a.qcow2")
        place.image("top.qcow2", below=path)
        place.virsh("pool-refresh", "disks")
        place.define("web", ("vda", "qcow2", path))
        place.define("db", volume("top.qcow2"))
        refusal(place, "web", errors.Conflict, "which db stands on")

    def test_frozen_image_that_a_volume_stands_on_stays(self, place, volume):
        place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
        vm = place.host.adopt("web")
        vm.create_snapshot("one")
        place.write("web", 2, 1)
        vm.create_snapshot("two")
        place.write("web", 3, 2)
        top = place.image("top.qcow2", below=vm.snapshot("two").disks["vda"])
        place.virsh("pool-refresh", "disks")
        place.define("db", volume(top.name))
        vm.snapshot("two").delete()
        assert place.bytes_of(top, "qcow2")[:3] == [1, 2, 0]
        place.virsh("undefine", "db")
        top.unlink()
        vm.merge()
        assert place.now(vm)["vda"][:3] == [1, 2, 3]
        place.check(vm)

    @pytest.mark.parametrize("how", ["by its volume", "left out", "plugged in since"])
    def test_image_of_a_disk_that_is_no_plain_file_of_a_snapshot_is_used(self, place, volume, how):
        """``image merge`` would leave a VM that names a file which is gone."""
        base = place.image("a.qcow2", fill=1)
        top = place.image("top.qcow2", below=base)
        place.virsh("pool-refresh", "disks")
        if how == "by its volume":
            place.define("web", volume(top.name))
        elif how == "plugged in since":
            place.define("web", ("vda", "qcow2", place.image("b.qcow2")))
            place.host.adopt("web")
            place.virsh("attach-disk", "web", top, "vdb", "--config", "--subdriver", "qcow2")
        else:
            place.define("web", ("vda", "qcow2", place.image("b.qcow2")), ("vdb", "qcow2", top))
            place.host.adopt("web", hvmgr.AdoptOptions(exclude_disks=("vdb",)))
        with pytest.raises(errors.Conflict, match="web"):
            place.host.images.merge(top)
        assert place.bytes_of(top, "qcow2")[0] == 1

    def test_image_that_a_vm_stands_on_stays_while_that_vms_home_is_away(self, place):
        """A file server that is not mounted: libvirt knows the VM, and the folder will be back."""
        place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
        vm = place.host.adopt("web")
        vm.create_snapshot("one")
        place.write("web", 2, 1)
        vm.create_snapshot("two")
        far = place.folder / "far"
        far.mkdir()
        top = place.image("far/top.qcow2", below=vm.snapshot("two").disks["vda"])
        place.define("db", ("vda", "qcow2", top))
        place.host.adopt("db", hvmgr.AdoptOptions(home=far / "db"))
        far.rename(place.folder / "away")
        frozen = Path(vm.snapshot("two").disks["vda"])
        vm.snapshot("two").delete()
        (place.folder / "away").rename(far)
        assert place.bytes_of(top, "qcow2")[:3] == [1, 2, 0]
        with pytest.raises(errors.Conflict, match="db"):
            far.rename(place.folder / "away")
            place.host.images.compact(frozen)
        place.virsh("undefine", "db")
        vm.merge()  # nobody knows it any more
        assert not frozen.exists()
        place.check(vm)

    @pytest.mark.parametrize("direct", [True, False], ids=["the image", "an overlay"])
    def test_frozen_image_in_another_slot_of_the_same_vm_stays(self, place, direct):
        """Somebody looks at an old state of a disk beside the present one."""
        place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
        vm = place.host.adopt("web")
        vm.create_snapshot("one")
        place.write("web", 2, 1)
        vm.create_snapshot("two")
        frozen = Path(vm.snapshot("two").disks["vda"])
        shown = frozen if direct else place.image("look.qcow2", below=frozen)
        mark = ["--mode", "readonly"] if direct else []
        place.virsh("attach-disk", "web", shown, "vdb", "--config", "--subdriver", "qcow2", *mark)
        if not direct:
            place.edit("web", lambda text: re.sub(r"(<disk )([^>]*>(?:(?!</disk>).)*dev='vdb')", r"\1snapshot='no' \2", text,
                                                  flags=re.DOTALL))  # fmt: skip
        vm.snapshot("two").delete()
        assert place.bytes_of(shown, "qcow2")[:3] == [1, 2, 0]
        place.virsh("start", "web")
        place.virsh("destroy", "web")
        place.virsh("detach-disk", "web", "vdb", "--config")
        if not direct:
            shown.unlink()
        vm.merge()
        assert not frozen.exists()
        place.check(vm)


class TestDevices:
    @pytest.fixture
    def loop(self, place, require_program):
        """A block device over a file."""
        backing = place.image("device.img", "raw", fill=7)
        program = require_program("losetup")
        made = subprocess.run([program, "-f", "--show", backing], check=False, capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"no loop devices here: {made.stderr}")
        yield Path(made.stdout.strip())
        subprocess.run([program, "-d", made.stdout.strip()], check=True)

    def test_block_device_is_a_base(self, place, loop):
        place.define("web", ("vda", "raw", loop))
        vm = place.host.adopt("web")
        place.write("web", 1, 1)
        one = vm.create_snapshot("one")
        place.write("web", 2, 2)
        assert place.seen(one)["vda"][:3] == [7, 1, 0]
        one.apply()
        assert place.now(vm)["vda"][:3] == [7, 1, 0]
        place.virsh("start", "web")
        place.write("web", 3, 3)
        vm.create_snapshot("two", type=hvmgr.SnapshotType.DISK_ONLY)
        place.virsh("destroy", "web")
        for name in ("one", "two"):
            vm.snapshot(name).delete()
        assert place.now(vm)["vda"][:4] == [7, 1, 0, 3]
        assert place.bytes_of(loop, "raw")[:4] == [7, 1, 0, 0]
        place.check(vm)

    def test_block_device_of_a_running_vm(self, place, loop):
        place.define("web", ("vda", "raw", loop))
        place.virsh("start", "web")
        vm = place.host.adopt("web")
        one = vm.create_snapshot("one")
        place.write("web", 2, 2)
        assert place.seen(one)["vda"][:3] == [7, 0, 0]
        assert place.now(vm)["vda"][:3] == [7, 0, 2]
