"""The same command a second time: with --if-needed and --if-exists what is there already is left alone, and only that."""

from __future__ import annotations

import subprocess

import pytest

import hvmgr as package
from hvmgr.storage.vm_home import VmHome, layout_of
from tests.faces.cli.conftest import files_of


def changed(answer):
    assert answer.code == 0, answer
    return answer.json["changed"]


def write(hvmgr, vm):
    """A guest's byte on the disk of a VM that is off."""
    path = hvmgr.ok("vm", "show", vm, "--json").json["now"]["disks"]["vda"]
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", path], check=True, capture_output=True)


class TestApply:
    def test_needs_nothing_until_a_byte_is_written(self, hvmgr, vm):
        hvmgr.ok("snapshot", "create", vm, "one")
        again = ("snapshot", "revert", vm, "--if-needed", "--json")
        assert not changed(hvmgr(*again))
        write(hvmgr, vm)
        assert hvmgr(*again, "--dry-run").json["plan"]["operation"] == "snapshot apply"
        assert changed(hvmgr(*again))
        assert not changed(hvmgr(*again))
        assert hvmgr(*again, "--dry-run").json["plan"] is None
        assert changed(hvmgr("snapshot", "revert", vm, "--json"))

    def test_leaves_the_undo_slot(self, hvmgr, vm, root):
        hvmgr.ok("snapshot", "create", vm, "one")
        write(hvmgr, vm)
        hvmgr.ok("snapshot", "apply", vm, "one")
        before = files_of(root)
        assert not changed(hvmgr("snapshot", "apply", vm, "one", "--if-needed", "--json"))
        assert files_of(root) == before

    def test_sees_another_snapshot_another_machine_and_other_firmware_variables(self, hvmgr, vm, root):
        hvmgr.ok("snapshot", "create", vm, "one")
        hvmgr.ok("snapshot", "create", vm, "two")
        assert changed(hvmgr("snapshot", "apply", vm, "one", "--if-needed", "--json"))
        hvmgr.ok("disk", "resize", vm, "vda", "9M")
        assert changed(hvmgr("snapshot", "apply", vm, "one", "--if-needed", "--json"))
        assert not changed(hvmgr("snapshot", "apply", vm, "one", "--if-needed", "--json"))
        home = VmHome(layout_of(root / vm, hvmgr.ok("vm", "show", vm, "--json").json["vm"]["id"]))
        home.present().nvram.write_bytes(b"a boot entry")
        assert changed(hvmgr("snapshot", "apply", vm, "one", "--if-needed", "--json"))
        edited = home.present()
        edited.set_vcpus(edited.vcpus + 1)
        with package.Host.open(root=root) as host:
            host.connection.define(edited.to_xml())
        assert changed(hvmgr("snapshot", "apply", vm, "one", "--if-needed", "--json"))
        assert not changed(hvmgr("snapshot", "apply", vm, "one", "--if-needed", "--json"))


class TestExport:
    def test_same_is_left_until_the_vm_changes(self, hvmgr, vm, tmp_path):
        hvmgr.ok("snapshot", "create", vm, "one")
        wanted = ("export", vm, tmp_path, "--if-exists", "same", "--json")
        assert changed(hvmgr(*wanted))
        before = files_of(tmp_path)
        assert not changed(hvmgr(*wanted))
        assert hvmgr(*wanted, "--dry-run").json["plan"] is None
        write(hvmgr, vm)
        refused = hvmgr(*wanted)
        assert (refused.code, refused.json["error"]["code"]) == (4, "Conflict")
        assert "--if-exists keep" in refused.json["error"]["hint"]
        assert not changed(hvmgr("export", vm, tmp_path, "--if-exists", "keep", "--json"))
        assert files_of(tmp_path) == before

    @pytest.mark.parametrize("others", [["--config-only"], ["--snapshots", "none"], ["--snapshot", "one"]])
    def test_of_another_kind_is_never_taken_for_it(self, hvmgr, vm, tmp_path, others):
        hvmgr.ok("snapshot", "create", vm, "one")
        hvmgr.ok("export", vm, tmp_path)
        assert hvmgr("export", vm, tmp_path, *others, "--if-exists", "keep", "--json").code == 4

    def test_of_one_snapshot_stays_what_it_is(self, hvmgr, vm, tmp_path):
        hvmgr.ok("snapshot", "create", vm, "one")
        wanted = ("export", vm, tmp_path, "--snapshot", "one", "--if-exists", "same", "--json")
        assert changed(hvmgr(*wanted))
        write(hvmgr, vm)
        assert not changed(hvmgr(*wanted))

    def test_of_another_vm_is_a_conflict(self, hvmgr, vm, tmp_path):
        hvmgr.ok("export", vm, tmp_path)
        hvmgr.ok("vm", "delete", vm, "--with-disks", "--yes")
        hvmgr.ok("vm", "create", vm, "--memory", "64M", "--disk", "8M", "--network", "none", "--accel", "tcg")
        assert hvmgr("export", vm, tmp_path, "--if-exists", "keep", "--json").code == 4

    def test_archive_is_kept_by_its_name_and_never_compared(self, hvmgr, vm, tmp_path):
        file = tmp_path / "one.tar.zst"
        assert changed(hvmgr("export", vm, "--archive", file, "--if-exists", "keep", "--json"))
        assert not changed(hvmgr("export", vm, "--archive", file, "--if-exists", "keep", "--json"))
        assert hvmgr("export", vm, "--archive", file, "--if-exists", "same", "--json").code == 2


class TestImport:
    @pytest.fixture
    def exported(self, hvmgr, vm, root):
        hvmgr.ok("snapshot", "create", vm, "one")
        hvmgr.ok("export", vm, root.parent / "out")
        return root.parent / "out" / vm

    @pytest.mark.parametrize("mode", ["copy", "link"])
    def test_same_source_is_imported_once(self, hvmgr, exported, mode):
        wanted = ("import", exported, "--name", "new", "--mode", mode, "--if-exists", "same", "--json")
        assert changed(hvmgr(*wanted))
        hvmgr.ok("snapshot", "create", "new", "more")
        hvmgr.ok("snapshot", "apply", "new", "one")
        assert not changed(hvmgr(*wanted))
        assert hvmgr(*wanted, "--dry-run").json["plan"] is None
        assert hvmgr.ok("vm", "show", "new", "--json").json["origin"]["mode"] == mode

    def test_another_source_or_mode_is_a_conflict_unless_kept(self, hvmgr, vm, exported, tmp_path):
        hvmgr.ok("import", exported, "--name", "new")
        assert hvmgr("import", exported, "--name", "new", "--mode", "link", "--if-exists", "same", "--json").code == 4
        write(hvmgr, vm)
        hvmgr.ok("export", vm, tmp_path / "later")
        later = ("import", tmp_path / "later", "--name", "new", "--json")
        refused = hvmgr(*later, "--if-exists", "same")
        assert (refused.code, refused.json["error"]["facts"].keys()) == (4, {"vm"})
        assert not changed(hvmgr(*later, "--if-exists", "keep"))
        assert hvmgr(*later).json["error"]["code"] == "Conflict"

    def test_registered_folder_is_the_vm(self, hvmgr, vm, exported):
        hvmgr.ok("vm", "delete", vm, "--with-disks", "--yes")
        wanted = ("import", exported, "--mode", "register", "--if-exists", "same", "--json")
        assert changed(hvmgr(*wanted))
        assert not changed(hvmgr(*wanted))

    def test_replacing_is_no_matter_of_being_there(self, hvmgr, exported):
        assert hvmgr("import", exported, "--keep-id", "--replace", "--if-exists", "keep").code == 2


def test_details_name_what_every_show_names(hvmgr, vm):
    hvmgr.ok("snapshot", "create", vm, "one")
    shown = hvmgr.ok("vm", "show", vm, "--json").json
    assert shown["snapshot"]["name"] == "one"
    del shown["schema"]
    assert hvmgr.ok("vm", "list", "--details", "--json").json["details"] == [shown]
    assert hvmgr("vm", "list", "--details").code == 2
