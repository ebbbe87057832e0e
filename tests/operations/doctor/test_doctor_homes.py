"""Homes that are damaged, moved, doubled, half-made or closed; each VM beside them is examined all the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model import plan
from hvmgr.model.plan import Plan
from hvmgr.operations.steps import execution
from hvmgr.storage import index, journal, start_guard, survey

MIB = 1 << 20
ID = "00000000-0000-4000-8000-000000000000"


def quarantine(vm):
    return sorted(path.name for path in (vm.home.layout.private / "quarantine").iterdir() if path.suffix != ".txt")


# --- configurations ---------------------------------------------------------------------------------------------------


def test_damaged_configuration_is_named_with_line_and_column_and_taken_from_libvirt(bench, vm):
    before, file = bench.photo(vm), vm.home.layout.configuration
    file.write_text(file.read_text().replace("<devices>", "<devices", 1))
    one = bench.one("configuration-damaged", vm)
    assert f"{file}, line " in one.sentence
    assert "column" in one.sentence
    assert one.vm == "web"
    bench.host.doctor("web")  # libvirt still knows the name
    assert bench.repair("web") == ["configuration-damaged"]
    assert quarantine(vm) == [file.name]
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_missing_configuration_is_taken_from_libvirt(bench, vm):
    before = bench.photo(vm)
    vm.home.layout.configuration.unlink()
    assert bench.codes() == {"configuration-missing"}
    assert bench.repair() == ["configuration-missing"]
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_libvirts_configuration_on_a_frozen_image_does_not_stand_in(bench, vm):
    frozen = Path(vm.snapshot("b").disks["hda"])
    vm.home.layout.configuration.unlink()
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", frozen, "qcow2"))
    assert bench.repair() == []
    assert "configuration-missing" in bench.codes()


def test_two_configurations_leave_the_others_listed_and_the_stranger_is_set_aside(bench, vm):
    other = bench.make(name="other")
    before, stray = bench.photo(vm), vm.home.layout.configuration.with_name(f"{other.id}.xml")
    shutil.copy(other.home.layout.configuration, stray)
    bench.said.clear()
    assert [one.name for one in bench.host.vms()] == ["other"]
    assert [line for line in bench.said if "left out: " in line and "2 configurations" in line]
    assert "home-ambiguous" in bench.codes()
    assert "home-ambiguous" in bench.repair()
    assert quarantine(vm) == [stray.name]
    assert bench.photo(vm) == before
    bench.healthy(vm)
    assert [one.name for one in bench.host.vms()] == ["other", "web"]


def test_two_configurations_of_which_both_could_be_right_stay(bench, vm):
    stray = vm.home.layout.configuration.with_name(f"{ID}.xml")
    stray.write_text("<broken")
    (vm.home.layout.snapshots / ID).mkdir()
    assert bench.repair() == []
    assert stray.exists()


def test_newer_format_is_refused_and_left_alone(bench, vm):
    file = vm.home.layout.configuration
    file.write_text(file.read_text().replace('format="1"', 'format="9"'))
    assert "home-newer" in bench.codes(vm)
    assert bench.repair(vm) == []
    assert 'format="9"' in file.read_text()


def test_home_of_another_vm_is_not_taken(bench, vm):
    file = vm.home.layout.configuration
    file.rename(file.with_name(f"{ID}.xml"))
    assert "configuration-damaged" in bench.codes()
    assert "another VM" in bench.one("configuration-damaged").sentence
    assert bench.repair() == []


def test_damaged_undo_slot_is_set_aside_and_its_images_stay(bench, vm):
    vm.snapshot("a").apply()
    away = dict(vm.tree().undo.disks)
    before = {slot: bench.bytes_of(path) for slot, path in away.items()}
    vm.home.layout.undo.write_text("<domain>")
    assert bench.codes(vm) == {"undo-damaged"}
    with pytest.raises(errors.Corrupt):
        vm.create_snapshot("c")
    assert bench.repair(vm) == ["undo-damaged"]
    vm.create_snapshot("c")
    assert {slot: bench.bytes_of(path) for slot, path in away.items()} == before
    bench.healthy(vm)


def test_damaged_snapshot_without_memory_is_named_and_nothing_is_removed(bench, vm):
    file = vm.home.layout.snapshot(vm.snapshot("a").id)
    text = file.read_bytes()
    file.write_bytes(text[: len(text) // 2])
    one = bench.one("snapshot-damaged", vm)
    assert one.where == str(file)
    assert bench.repair(vm) == []
    file.write_bytes(text)
    bench.healthy(vm)


def test_snapshot_whose_parent_is_gone_counts_as_a_root(bench, vm):
    a = vm.snapshot("a")
    vm.home.layout.snapshot(a.id).unlink()
    shutil.rmtree(vm.home.layout.snapshot_folder(a.id), ignore_errors=True)
    assert bench.codes(vm) == {"snapshot-missing"}
    assert "snapshot 'b'" in bench.one("snapshot-missing", vm).sentence


# --- interrupted ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The command died."""


def interrupt(monkeypatch, step_class, call):
    """A command that dies before a step; its journal stays."""
    real, go_back = execution.DO[step_class], execution._go_back

    def die(session, step):
        raise Killed

    monkeypatch.setitem(execution.DO, step_class, die)
    monkeypatch.setattr(execution, "_go_back", lambda *_: None)
    with pytest.raises(Killed):
        call()
    monkeypatch.setitem(execution.DO, step_class, real)
    monkeypatch.setattr(execution, "_go_back", go_back)


@pytest.mark.parametrize("step", [plan.FreezeImage, plan.Define])
def test_interrupted_operation_is_named_and_completed_or_undone(bench, vm, monkeypatch, step):
    before = bench.photo(vm)
    interrupt(monkeypatch, step, lambda: vm.create_snapshot("c"))
    one = bench.one("operation-open", vm)
    assert "snapshot" in one.sentence
    assert bench.codes(vm) == {"operation-open"}
    assert bench.would(vm) == ["operation-open"]
    bench.repair(vm)
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_merge_that_was_killed_is_completed_and_the_vm_starts(bench, vm, monkeypatch):
    before = bench.photo(vm)
    interrupt(monkeypatch, plan.RemoveImage, lambda: vm.snapshot("b").delete())
    assert bench.codes(vm) == {"operation-open"}
    bench.repair(vm)
    after = bench.photo(vm)
    assert after == {name: seen for name, seen in before.items() if name[0] != "b"}
    bench.healthy(vm)
    bench.start(vm)
    vm.stop(force=True)


def test_interrupted_creation_of_a_vm_is_undone(bench, monkeypatch):
    interrupt(monkeypatch, plan.Define, lambda: bench.make(4, name="half"))
    assert bench.codes() == {"operation-open"}
    assert bench.repair() == ["operation-open"]
    assert not (bench.host.root / "half").exists()
    assert bench.codes() == set()


def test_folder_of_a_command_that_died_before_its_plan_goes(bench):
    private = bench.host.root / "half" / ".hvmgr"
    private.mkdir(parents=True)
    (private / "lock").write_text("1\n")
    assert bench.codes() == {"home-half-made"}
    assert bench.repair() == ["home-half-made"]
    assert not private.parent.exists()


def test_journal_of_garbage_is_set_aside_where_all_is_whole(bench, vm):
    before = bench.photo(vm)
    vm.home.layout.journal.write_bytes(b"\0" * 300)
    assert bench.codes(vm) == {"journal-damaged"}
    with pytest.raises(errors.Corrupt):
        vm.create_snapshot("c")
    assert bench.repair(vm) == ["journal-damaged"]
    assert quarantine(vm) == ["journal"]
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_journal_of_garbage_stays_where_something_is_half_way(bench, vm):
    vm.home.layout.journal.write_bytes(b"\0" * 300)
    vm.home.layout.put_away.write_bytes(b"memory")
    assert "journal-damaged" not in bench.repair(vm)
    assert vm.home.layout.journal.exists()


def test_journal_of_a_newer_hvmgr_stays(bench, vm):
    one = Plan(plan_id=ID, vm_id=vm.id, operation="x", subject="x").to_json()
    vm.home.layout.journal.write_text(json.dumps({**one, "format": 2}) + "\n")
    assert bench.codes(vm) == {"journal-damaged"}
    assert bench.repair(vm) == []


def test_command_at_work_is_not_disturbed(bench, vm):
    journal.begin(vm.home.layout.journal, Plan(plan_id=ID, vm_id=vm.id, operation="x", subject="x"))
    with vm.home.locked(wait_s=1):
        assert [str(one.code) for one in bench.find(vm)] == ["operation-running"]
        assert bench.repair(vm) == []
    assert bench.repair(vm) == ["operation-open"]


def test_left_overs_of_dead_commands_are_swept(bench, vm):
    layout = vm.home.layout
    (layout.images / ".hvmgr-part-1").write_bytes(b"x")
    (layout.images / ".hvmgr-part-1").chmod(0o600)
    (layout.private / "daemon").write_text("999999 1")
    found = {str(one.code) for one in bench.find(vm)}
    assert found == {"remains", "daemon-left"}
    assert set(bench.repair(vm)) == {"daemon-left"}
    assert bench.find(vm) == []


# --- places -----------------------------------------------------------------------------------------------------------


def fresh(bench, monkeypatch, *vms):
    """libvirt has forgotten everything, and the index is empty: another host."""
    monkeypatch.setenv("HVMGR_INDEX", str(bench.place / "fresh-index"))
    for vm in vms:
        bench.domain(vm).undefine(keep_nvram=True, keep_tpm=True)


def test_everything_is_rebuilt_from_the_home_alone_on_a_fresh_host(bench, vm, monkeypatch):
    before = bench.photo(vm)
    fresh(bench, monkeypatch, vm)
    shutil.rmtree(vm.home.layout.private)
    assert {"domain-unknown", "index-missing", "folder-missing"} <= bench.codes()
    bench.repair()
    bench.healthy(vm)
    assert bench.photo(vm) == before
    assert [entry.vm_id for entry in index.entries()] == [vm.id]
    for name in "ab":
        vm.snapshot(name).apply()
        for slot in ("hda", "hdb"):
            assert bench.photo(vm)[f"now {slot}"] == before[f"{name} {slot}"]
    bench.healthy(vm)


def test_home_copied_to_another_place_on_a_fresh_host_is_settled_there(bench, vm, monkeypatch):
    vm.snapshot("a").apply()
    bench.write(vm, 9)
    before, undo = bench.photo(vm), {slot: bench.bytes_of(path) for slot, path in vm.tree().undo.disks.items()}
    there = bench.open_host("elsewhere")
    there.root.mkdir(mode=0o711)
    subprocess.run(["cp", "-a", vm.path, there.root / "web"], check=True)
    fresh(bench, monkeypatch, vm)
    shutil.rmtree(vm.path)
    bench.host = there
    moved = there.vm("web")
    assert bench.codes() == {"home-moved"}
    assert bench.would() == ["home-moved"]
    done = bench.repair()
    assert done[0] == "home-moved"
    assert bench.photo(moved) == before
    bench.healthy(moved)
    moved.undo()
    assert {slot: bench.photo(moved)[f"now {slot}"] for slot in undo} == undo
    for name in "ab":
        moved.snapshot(name).apply()
        assert bench.photo(moved)["now hda"] == before[f"{name} hda"]
        assert bench.photo(moved)["now hdb"] == before[f"{name} hdb"]
    bench.start(moved)
    moved.stop(force=True)
    bench.healthy(moved)


def test_home_moved_under_a_libvirt_that_knows_it_is_settled(bench, vm):
    before = bench.photo(vm)
    new = vm.path.with_name("other place")
    vm.path.rename(new)
    assert bench.codes() == {"home-moved", "index-stale"}
    bench.repair()
    moved = bench.host.vm("web")
    assert moved.path == new
    assert bench.photo(moved) == before
    bench.healthy(moved)


def test_copy_beside_the_original_is_an_error_and_both_stay(bench, vm):
    before = bench.photo(vm)
    copy = vm.path.with_name("copy")
    shutil.copytree(vm.path, copy)
    assert "id-twice" in bench.codes(vm)
    assert bench.codes(copy) == {"id-twice"}
    bench.repair()
    assert bench.photo(vm) == before
    shutil.rmtree(copy)
    bench.healthy(vm)


def test_vm_of_another_connection_is_taken_only_when_it_is_named(bench, vm, monkeypatch):
    before = bench.photo(vm)
    other = f"qemu:///embed?root={bench.place}/gone"
    for file in [vm.home.layout.configuration, *vm.home.layout.snapshots.glob("*.xml")]:
        file.write_text(file.read_text().replace(bench.uri, other))
    fresh(bench, monkeypatch, vm)
    assert "other-connection" in bench.codes()
    assert "other-connection" not in bench.repair()
    assert "other-connection" in bench.repair(vm)
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_vm_that_the_other_libvirt_still_knows_is_not_taken(bench, vm, monkeypatch):
    other = bench.place / "other"
    (other / "etc" / "qemu").mkdir(parents=True)
    (other / "etc" / "qemu" / "web.xml").write_text(f"<domain><uuid>{vm.id}</uuid></domain>")
    file = vm.home.layout.configuration
    file.write_text(file.read_text().replace(bench.uri, f"qemu:///embed?root={other}"))
    fresh(bench, monkeypatch, vm)
    assert "other-connection" not in bench.repair(vm)


def test_home_elsewhere_that_index_and_libvirt_forgot_is_named_by_its_path(bench, monkeypatch):
    vm = bench.make(4, home=bench.place / "far")
    fresh(bench, monkeypatch, vm)
    with pytest.raises(errors.NotFound):
        bench.find("web")
    assert "domain-unknown" in bench.codes(vm.path)
    bench.repair(vm.path)
    assert bench.host.vm("web").path == vm.path
    bench.healthy(vm)


def test_unknown_vm_offers_near_names(bench, vm):
    with pytest.raises(errors.NotFound, match="there is no VM 'wbe'") as found:
        bench.find("wbe")
    assert "web" in found.value.hint
    with pytest.raises(errors.NotFound):
        bench.find(bench.place)


# --- the index --------------------------------------------------------------------------------------------------------


def test_index_entries_of_homes_that_are_gone_are_set_aside(bench, vm):
    folder = Path(os.environ["HVMGR_INDEX"])
    index.record(index.Entry(ID, "gone", bench.place / "nowhere", bench.uri, ()))
    (folder / "homes" / "garbage.json").write_text("{")
    assert bench.codes() == {"index-stale", "index-damaged"}
    assert set(bench.repair()) == {"index-stale", "index-damaged"}
    assert sorted(path.name for path in (folder / "quarantine").iterdir()) == [f"{ID}.json", "garbage.json"]
    bench.healthy(vm)


def test_index_entry_of_another_libvirt_stays_while_its_home_is_away(bench, vm):
    """Its images are counted as used until that libvirt says that the VM is gone."""
    index.record(index.Entry(ID, "away", bench.place / "nowhere", "qemu:///session", (str(bench.place / "base"),)))
    assert bench.codes() == {"index-stale"}
    assert bench.repair() == []
    assert ID in {note.file.stem for note in index.notes()}
    assert bench.codes(vm) == set()


def test_read_only_home_is_examined(bench, vm):
    subprocess.run(["mount", "--bind", vm.path, vm.path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", vm.path], check=True)
        assert bench.codes(vm) == {"home-unwritable"}
        Path(vm.snapshot("a").disks["hda"]).stat()
        assert bench.host.repair(str(vm.path)) == []
    finally:
        subprocess.run(["umount", "-l", vm.path], check=True)
    bench.healthy(vm)


def test_start_that_was_allowed_in_any_case_is_told(bench, vm):
    start_guard.allow_once(vm.home.layout)
    assert [str(one.code) for one in bench.find(vm)] == ["start-allowed"]


def test_home_that_nobody_may_read_is_named(bench, vm, monkeypatch):
    def refuse(folder):
        raise errors.HostFailed(f"no permission for {folder}", hint="run as root")

    monkeypatch.setattr(survey, "configurations", refuse)
    found = bench.host.doctor(str(vm.path))
    assert {str(one.code) for one in found} == {"home-unreadable"}


def test_disks_that_a_deleted_vm_left_are_no_home(bench, vm):
    def change(edited):
        (disk,) = [one for one in edited.root.findall("devices/disk") if one.find("target").get("dev") == "hdb"]
        disk.getparent().remove(disk)

    bench.edit(vm, change)
    assert vm.delete()
    assert bench.codes() == set()


def test_home_that_lost_all_but_its_disks_is_named_by_libvirt(bench):
    vm = bench.make(4)
    before = bench.photo(vm)
    for folder in (vm.home.layout.private, vm.home.layout.configuration.parent, vm.home.layout.snapshots):
        shutil.rmtree(folder)
    assert bench.codes() == {"configuration-missing"}
    bench.repair()
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_moved_home_with_a_managed_save_is_not_settled(bench, vm):
    bench.start(vm)
    bench.domain(vm).managed_save()
    new = vm.path.with_name("moved")
    vm.path.rename(new)
    done = bench.host.repair(str(new))
    assert "managedsave-remove" in done[0].hint
    new.rename(vm.path)
    assert bench.domain(vm).has_managed_save()
    bench.domain(vm).remove_managed_save()
    bench.healthy(vm)
