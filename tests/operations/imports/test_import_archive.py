"""Archives of exports as sources: looked into, unpacked where the VM is to be, and never believed."""

from __future__ import annotations

import io
import os
import tarfile
import uuid

import pytest

import hvmgr
from hvmgr import errors, settings
from hvmgr.operations.exchange import import_document
from hvmgr.storage import archives, durable

MIB = 1 << 20


def packed(bench, vm, name="web.tar.zst", **options):
    file = bench.place / name
    vm.export_archive(file, hvmgr.ExportOptions(**options))
    return file


def plain(bench, file):
    """The same archive without compression, writable."""
    target = bench.place / "plain.tar"
    bench.run("zstd", "-q", "-d", "-f", file, "-o", target)
    return target


def shown():
    """The folders that show what archives hold."""
    place = settings.index_folder() / "archives"
    return [one for one in place.iterdir() if one.is_dir()] if place.is_dir() else []


@pytest.fixture
def archive(bench, branched):
    """An archive of the forked tree, whose VM is gone; what its disks showed."""
    seen, tree, file = bench.photo(branched), bench.tree(branched), packed(bench, branched)
    branched.delete(with_disks=True)
    return file, seen, tree


class TestWhole:
    @pytest.mark.parametrize("compressed", [True, False], ids=["zstd", "plain"])
    def test_import_has_everything(self, bench, archive, compressed):
        file, seen, tree = archive
        file = file if compressed else plain(bench, file)
        before = bench.file_of(file)
        assert bench.codes(file) == []
        assert bench.host.verify(file) == []
        first, second = bench.bring(file), bench.bring(file, name="second")
        for vm in (first, second):
            assert bench.photo(vm) == seen
            assert bench.tree(vm) == tree
            bench.check(vm)
            vm.snapshot("left").apply()
            bench.write(vm, 1)
        assert bench.file_of(file) == before
        assert first.id != second.id
        assert [one.name for one in bench.place.iterdir() if one.name.startswith(".")] == []
        bench.host.close()
        assert shown() == []

    def test_place_of_the_vm_with_its_id(self, bench, branched):
        file, seen = packed(bench, branched), bench.photo(branched)
        bench.write(branched, 0x12, 3 * MIB)
        branched.snapshot("two").delete()
        changed = bench.photo(branched)
        vm = bench.bring(file, new_id=False, replace=True)
        assert bench.photo(vm)["now hda"] == seen["now hda"]
        assert bench.photo(vm)["two hda"] == seen["two hda"]
        bench.check(vm)
        vm.undo()
        assert bench.photo(vm)["now hda"] == changed["now hda"]

    def test_flat_disks_with_holes(self, bench):
        path = bench.place / "big.raw"
        with path.open("wb") as file:
            for offset in (0, 10 * MIB, 64 * MIB - 4096):
                file.seek(offset)
                file.write(os.urandom(4096))
        vm = bench.make(bench.in_place(path))
        packed_file = packed(bench, vm)
        vm.delete()
        made = bench.bring(packed_file, name="copy")
        (image,) = made.now().disks.values()
        bench.run("cmp", path, image)
        assert os.stat(image).st_blocks * 512 < MIB

    def test_maps_and_roots(self, bench, archive):
        file, seen, _ = archive
        shelf = bench.place / "shelf"
        shelf.mkdir(mode=0o711)
        vm = bench.bring(file, disk_targets={"hda": str(shelf / "base.qcow2")}, snapshot_path=bench.place / "snaps")
        assert (shelf / "base.qcow2").exists()
        assert bench.photo(vm) == seen
        bench.check(vm)

    def test_configuration_alone_with_its_disks_elsewhere(self, bench, branched):
        file = packed(bench, branched, config_only=True)
        assert "image-outside" in bench.codes(file)
        seen = bench.photo(branched)
        vm = bench.bring(file, name="copy", paths={str(branched.path): str(branched.path)})
        assert bench.photo(vm) == seen

    def test_saved_vm_goes_on(self, bench, branched):
        bench.start(branched)
        branched.create_snapshot("running")
        bench.domain(branched).managed_save()
        file = packed(bench, branched)
        assert bench.host.verify(file) == []
        branched.start()
        branched.stop(force=True)
        branched.delete(with_disks=True)
        vm = bench.bring(file)
        assert str(vm.state()) == "saved"
        vm.start()
        assert str(vm.state()) == "running"
        writing = {str(path) for path in bench.domain(vm).writable_files()}
        assert writing == set(vm.now().disks.values())
        vm.stop(force=True)
        vm.snapshot("running").apply()
        assert str(vm.state()) == "running"
        vm.stop(force=True)

    def test_saved_memory_comes_back_to_its_vm(self, bench, branched):
        bench.start(branched)
        bench.domain(branched).managed_save()
        file = packed(bench, branched)
        branched.start()
        branched.stop(force=True)
        vm = bench.bring(file, new_id=False, replace=True)
        assert str(vm.state()) == "saved"
        assert not (vm.path / ".hvmgr" / "unpacked.save").exists()
        vm.start()
        assert str(vm.state()) == "running"
        vm.stop(force=True)

    def test_plan_names_the_archive(self, bench, archive):
        file, _, _ = archive
        plan = bench.host.plan_import(file)
        assert plan.source == file
        plan.name = "other"
        assert plan.run().name == "other"

    def test_plan_in_a_file(self, bench, archive):
        file, seen, _ = archive
        plan = bench.host.plan_import(file)
        text = bench.place / "plan.yaml"
        text.write_text(import_document.to_yaml(plan, plan.check()))
        assert bench.photo(import_document.read_file(bench.host, text).run()) == seen

    def test_dry_run_leaves_nothing(self, bench, archive):
        file, _, _ = archive
        host = hvmgr.Host.open(
            bench.uri, root=bench.host.root, reporter=hvmgr.Reporter(approve=lambda _plan: False, dry_run=True)
        )
        before = bench.states()
        with pytest.raises(errors.Declined):
            host.import_vm(file)
        host.close()
        assert bench.states() == before
        assert shown() == []

    def test_packed_again_by_hand(self, bench, archive):
        file, seen, _ = archive
        folder = bench.place / "unpacked"
        folder.mkdir()
        bench.run("tar", "--zstd", "-xf", file, "-C", folder)
        again = bench.place / "again.tar.zst"
        bench.run("tar", "--zstd", "-cf", again, "-C", folder, "./web")
        assert bench.host.verify(again) == []
        assert bench.photo(bench.bring(again)) == seen


class TestRefused:
    @pytest.mark.parametrize("mode", [hvmgr.Mode.LINK, hvmgr.Mode.REGISTER])
    def test_modes_that_need_files(self, bench, archive, mode):
        with pytest.raises(errors.UsageError, match="is an archive"):
            bench.bring(archive[0], mode=mode)

    @pytest.mark.parametrize("compressed", [True, False], ids=["zstd", "plain"])
    @pytest.mark.parametrize("part", [0.5, 0.999])
    def test_cut_off(self, bench, archive, compressed, part):
        file = archive[0] if compressed else plain(bench, archive[0])
        cut = bench.place / "cut"
        cut.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
        before = bench.states()
        for act in (bench.bring, bench.codes, bench.host.verify):
            with pytest.raises(errors.Corrupt, match="cut"):
                act(cut)
        assert bench.states() == before
        assert shown() == []

    def test_changed_byte_of_an_image(self, bench, archive):
        file = plain(bench, archive[0])
        with tarfile.open(file) as tar:
            member = next(one for one in tar.getmembers() if one.name.endswith(".qcow2") and one.size > MIB // 4)
        with file.open("r+b") as writer:
            writer.seek(member.offset_data + 200_000)
            byte = writer.read(1)
            writer.seek(-1, os.SEEK_CUR)
            writer.write(bytes([byte[0] ^ 1]))
        assert [one.code for one in bench.host.verify(file)] == ["wrong-hash"]
        assert [one.code for one in bench.host.plan_import(file).check(thorough=True) if one.severity == "error"] == [
            "wrong-hash"
        ]
        before = bench.states()
        with pytest.raises(errors.Corrupt, match="other bytes than were recorded") as caught:
            bench.bring(file)
        assert caught.value.exit_code == 6
        assert bench.states() == before

    def test_changed_byte_of_a_configuration(self, bench, archive):
        file = plain(bench, archive[0])
        data = file.read_bytes()
        file.write_bytes(data.replace(b"<vcpu", b"<vcqu", 1).replace(b"</vcpu", b"</vcqu", 1))
        assert "wrong-hash" in bench.codes(file)
        with pytest.raises(errors.Corrupt):
            bench.bring(file)

    @pytest.mark.parametrize("kind", ["gzip", "other"])
    def test_no_archive_of_an_export(self, bench, kind):
        file = bench.place / "x"
        with tarfile.open(file, "w:gz" if kind == "gzip" else "w") as tar:
            tar.addfile(tarfile.TarInfo("readme"), io.BytesIO())
        with pytest.raises(errors.Unsupported if kind == "gzip" else errors.NotFound) as caught:
            bench.bring(file)
        assert "gzip" in str(caught.value) if kind == "gzip" else f"{file} is neither" in str(caught.value)

    def test_plan_of_one_of_two_vms(self, bench):
        file = bench.place / "two.tar"
        with tarfile.open(file, "w") as tar:
            for name, vm_id in (("a", uuid.uuid4()), ("b", uuid.uuid4())):
                xml = f"<domain type='qemu'><name>{name}</name><uuid>{vm_id}</uuid><memory>65536</memory>"
                data = f"{xml}<os><type>hvm</type></os></domain>".encode()
                info = tarfile.TarInfo(f"{name}/Virtual Machines/{vm_id}.xml")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        plan = bench.host.plan_import(file, hvmgr.ImportOptions(vm="b"))
        text = import_document.to_yaml(plan, plan.check())
        again = import_document.from_yaml(bench.host, text, source="plan.yaml")
        assert (plan.name, again.name) == ("b", "b")
        with pytest.raises(errors.UsageError, match="holds 2 VMs: a, b"):
            import_document.from_yaml(bench.host, text.replace('vm: "b"', "vm: ~"), source="plan.yaml")

    def test_image_that_no_file_system_takes(self, bench):
        file, size, name = bench.place / "x.tar", 1 << 61, "web/Virtual Hard Disks/x.img"
        info, table = tarfile.TarInfo(name), b"1\n0\n0\n".ljust(512, b"\0")
        info.size = len(table)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
        with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(info, io.BytesIO(table))
        with pytest.raises(errors.Unsupported, match=f"{name} has {size} bytes"):
            bench.bring(file)

    def test_archive_that_is_replaced_meanwhile(self, bench, archive, monkeypatch):
        file = archive[0]
        real = archives.unpack

        def late(*args, **kwargs):
            os.utime(file)
            return real(*args, **kwargs)

        monkeypatch.setattr(archives, "unpack", late)
        before = bench.states()
        with pytest.raises(errors.Conflict, match="was changed meanwhile"):
            bench.bring(file)
        assert {**bench.states()[0], file: None} == {**before[0], file: None}

    def test_what_a_killed_process_showed_is_swept(self, bench, archive):
        left = settings.index_folder() / "archives" / "dead"
        durable.make_folder(left.parent)
        durable.make_folder(left)
        (left / "lock").touch()
        assert bench.host.vms() == []
        assert not left.exists()
