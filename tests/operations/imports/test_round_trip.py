"""Real exports come back: all modes, from a VM that is off or runs, with and without disks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.storage import source_home

ExportOptions = hvmgr.ExportOptions


def sums_are_true(folder):
    done = subprocess.run(
        ["sha256sum", "--quiet", "-c", "SHA256SUMS"],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def shelf(bench):
    shelf = bench.place / "exports"
    shelf.mkdir(mode=0o711)
    shelf.chmod(0o711)
    return shelf


def errors_of(bench, source, **options):
    plan = bench.host.plan_import(source, hvmgr.ImportOptions(**options))
    return [(one.code, one.sentence) for one in plan.check() if one.severity == "error"]


@pytest.mark.parametrize("mode", list(hvmgr.Mode))
def test_export_comes_back_in_every_mode(bench, branched, shelf, mode):
    before, tree = bench.photo(branched), bench.tree(branched)
    export = branched.export(shelf)
    branched.delete(with_disks=True)
    vm = bench.bring(export, mode=mode)
    assert bench.photo(vm) == before
    assert bench.tree(vm) == tree
    bench.check(vm)
    if mode is not hvmgr.Mode.REGISTER:
        sums_are_true(export)
    vm.snapshot("two").apply()
    assert bench.photo(vm)["now hda"] == before["two hda"]


def test_gold_serves_copies_and_links_at_once(bench, branched, shelf):
    export = branched.export(shelf)
    vms = [bench.bring(export, name=f"copy{number}") for number in range(2)]
    vms += [bench.bring(export, name=f"link{number}", mode=hvmgr.Mode.LINK) for number in range(2)]
    for vm in vms:
        bench.start(vm)
    assert len({vm.id for vm in vms} | {vm.home.present().genid for vm in vms}) == 8
    for vm in vms:
        vm.stop(force=True)
    sums_are_true(export)


def test_running_vm_with_its_memory(bench, branched, shelf):
    bench.start(branched)
    branched.create_snapshot("live")
    export = branched.export(shelf, ExportOptions(with_state=True))
    branched.stop(force=True)
    vm = bench.bring(export, name="other")
    assert str(vm.state()) == "saved"
    vm.start()
    assert str(vm.state()) == "running"
    vm.snapshot("live").apply(discard_state=True)
    assert str(vm.state()) == "running"
    vm.stop(force=True)
    bench.check(vm)


def test_one_snapshot_becomes_a_vm_of_its_own(bench, branched, shelf):
    before = bench.photo(branched)
    export = branched.export(shelf, ExportOptions(snapshot="three"))
    vm = bench.bring(export, name="alone")
    assert bench.photo(vm) == {"now hda": before["three hda"]}
    kept = bench.bring(export, name="kept", new_id=False)
    assert bench.photo(kept) == {"now hda": before["three hda"]}


class TestConfigurationAlone:
    @pytest.fixture
    def source(self, bench, branched, shelf):
        """The configuration in one place, the disks in another."""
        export = branched.export(shelf, ExportOptions(config_only=True))
        disks = bench.place / "disks"
        shutil.copytree(branched.path, disks)
        self.before = bench.photo(branched)
        self.old = branched.path
        branched.delete(with_disks=True)
        return export, disks

    def test_disks_are_asked_for(self, bench, source):
        assert {code for code, _ in errors_of(bench, source[0])} == {"missing-disk"}

    def test_disks_elsewhere_are_named_by_path(self, bench, source):
        export, disks = source
        vm = bench.bring(export, paths={str(self.old): str(disks)})
        assert bench.photo(vm) == self.before
        bench.check(vm)

    def test_wrong_disk_is_noticed(self, bench, source):
        export, disks = source
        base = next((disks / "Virtual Hard Disks").iterdir())
        base.chmod(0o600)
        bench.write_image(base, 0x66, 1 << 16)
        found = bench.host.plan_import(export, hvmgr.ImportOptions(paths={str(self.old): str(disks)}))
        assert "wrong-hash" in [one.code for one in found.check(thorough=True)]
        with pytest.raises(errors.Corrupt):
            found.run()


def test_single_disk_of_a_configuration_alone_is_named_by_slot(bench, shelf):
    vm = bench.make(4)
    bench.write(vm, 0x42)
    before = bench.photo(vm)
    export = vm.export(shelf, ExportOptions(config_only=True))
    (path,) = vm.now().disks.values()
    shutil.copy(path, bench.place / "moved.qcow2")
    vm.delete(with_disks=True)
    assert bench.photo(bench.bring(export, disks={"hda": str(bench.place / "moved.qcow2")})) == before


def test_export_names_nothing_outside_itself(bench, shelf):
    gold = bench.image("gold.qcow2", fill=(7,))
    vm = bench.make(bench.in_place(gold))
    vm.create_snapshot("one")
    export = vm.export(shelf)
    source = source_home.open_source(export)
    assert source.problems == ()
    assert all(Path(path).is_relative_to(export) for path in source.images)
