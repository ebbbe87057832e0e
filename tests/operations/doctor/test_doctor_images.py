"""Images that are gone, moved, exchanged, changed or closed: found by code, put right where that is certain."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model.tree import WARN_DEPTH
from hvmgr.operations import merge
from hvmgr.storage import frozen, index, start_guard

MIB = 1 << 20


def working(vm, slot="hda"):
    return Path(vm.now().disks[slot])


def frozen_at(vm, name, slot="hda"):
    return Path(vm.snapshot(name).disks[slot])


def append(path, data=b"x" * 512):
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("ab") as file:
        file.write(data)
    path.chmod(mode)


def test_nothing_is_wrong_with_a_whole_vm(bench, vm):
    bench.healthy(vm)
    assert bench.repair() == []
    assert bench.find(vm.id) == bench.find(vm.name) == bench.find(vm)


# --- missing and renamed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["working", "frozen"])
@pytest.mark.parametrize("where", ["suffix", "beside", "bases"])
def test_renamed_image_is_found_again_by_its_id(bench, vm, which, where):
    before = bench.photo(vm)
    path = working(vm) if which == "working" else frozen_at(vm, "b")
    target = {
        "suffix": path.with_name(f"{path.name}.bak"),
        "beside": vm.path.parent / f"saved-{path.name}",
        "bases": vm.home.layout.bases / path.name,
    }[where]
    path.rename(target)
    (one,) = [one for one in bench.find(vm) if one.code == "image-missing" and one.where == str(path)]
    assert ("the present" if which == "working" else "snapshot 'b'") in one.sentence
    assert "image-missing" in bench.would(vm)
    bench.repair(vm)
    assert path.exists()
    assert not target.exists()
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_frozen_image_without_its_name_is_found_by_its_record(bench, vm):
    before, path = bench.photo(vm), frozen_at(vm, "b")
    path.rename(vm.path / "thing")
    assert bench.repair(vm) == ["image-missing"]
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_working_image_without_its_name_is_not_guessed(bench, vm):
    path = working(vm)
    path.rename(vm.path / "thing")
    assert bench.repair(vm) == []
    assert {"image-missing", "orphan"} <= bench.codes(vm)
    assert str(path.parent.parent.parent / "thing") in bench.one("orphan", vm).sentence


def test_two_files_that_could_be_the_image_are_one_too_many(bench, vm):
    path = working(vm)
    shutil.copy2(path, path.with_name(f"{path.name}.1"))
    path.rename(path.with_name(f"{path.name}.2"))
    assert "image-missing" not in bench.repair(vm)
    assert "image-missing" in bench.codes(vm)


def test_image_that_is_gone_for_good_names_those_that_need_it(bench, vm):
    path = frozen_at(vm, "a")
    path.rename(bench.place / "elsewhere")
    one = bench.one("image-missing", vm)
    assert "snapshot 'a'" in one.sentence
    assert frozen_at(vm, "b").name in one.sentence
    assert bench.repair(vm) == []
    (bench.place / "elsewhere").rename(path)
    bench.healthy(vm)


def test_candidate_that_was_changed_is_refused(bench, vm):
    path = frozen_at(vm, "b")
    target = path.with_name(f"{path.name}.bak")
    path.rename(target)
    append(target)
    assert "image-missing" not in bench.repair(vm)


def test_file_that_another_vm_uses_is_not_taken(bench, vm):
    path = frozen_at(vm, "b")
    target = bench.host.root / f"taken-{path.name}"
    shutil.copy2(path, target)
    path.unlink()
    bench.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", target)
    bench.make(bench.in_place(target), name="other")
    assert "image-missing" not in bench.repair(vm)
    assert target.exists()


def test_base_outside_is_found_by_its_inode(bench):
    base = bench.image("base.qcow2", fill=(7,))
    vm = bench.make(bench.in_place(base))
    vm.create_snapshot("a")
    before = bench.photo(vm)
    base.rename(base.with_name("renamed.img"))
    assert bench.repair(vm) == ["image-missing"]
    assert bench.photo(vm) == before
    bench.healthy(vm)


# --- exchanged --------------------------------------------------------------------------------------------------------


def exchange(first, second):
    part = first.with_name("part")
    first.rename(part)
    second.rename(first)
    part.rename(second)


def test_two_frozen_images_that_changed_names_change_back(bench, vm):
    before = bench.photo(vm)
    exchange(frozen_at(vm, "b"), frozen_at(vm, "b", "hdb"))
    assert "image-changed" in bench.codes(vm)
    assert "image-changed" in bench.would(vm)
    bench.repair(vm)
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_working_and_frozen_image_that_changed_names_change_back(bench, vm):
    before = bench.photo(vm)
    exchange(working(vm), frozen_at(vm, "b"))
    assert "image-changed" in bench.codes(vm)
    bench.repair(vm)
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_two_working_images_that_changed_names_change_back(bench, vm):
    before = bench.photo(vm)
    exchange(working(vm), working(vm, "hdb"))
    assert "image-swapped" in bench.codes(vm)
    assert bench.repair(vm) == ["image-swapped"]
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_true_frozen_image_replaces_the_one_that_took_its_name(bench, vm):
    before, path = bench.photo(vm), frozen_at(vm, "b")
    path.rename(vm.path / "original")
    bench.run("qemu-img", "create", "-f", "qcow2", path, "4M")
    assert "image-changed" in bench.codes(vm)
    bench.repair(vm)
    assert bench.photo(vm) == before
    aside = vm.home.layout.private / "quarantine" / path.name
    assert aside.exists()
    assert str(path) in aside.with_name(f"{path.name}.txt").read_text()
    assert bench.one("quarantined", vm).where == str(aside)
    bench.healthy(vm)


# --- changed ----------------------------------------------------------------------------------------------------------


def test_changed_frozen_image_is_an_error_that_nobody_can_repair(bench, vm):
    path = frozen_at(vm, "a")
    append(path)
    one = bench.one("image-changed", vm)
    assert "snapshot 'a'" in one.sentence
    assert bench.repair(vm) == []
    assert bench.codes(vm) == {"image-changed"}


def test_touched_frozen_image_is_taken_only_when_the_user_vouches(bench, vm):
    path, before = frozen_at(vm, "a"), bench.photo(vm)
    os.utime(path)
    assert bench.codes(vm) == {"image-touched"}
    assert bench.repair(vm) == []
    with pytest.raises(errors.Corrupt):
        vm.snapshot("a").apply()
    assert bench.repair(vm, accept_touched=True) == ["image-touched"]
    vm.snapshot("a").apply()
    assert bench.photo(vm)["now hda"] == before["a hda"]
    bench.healthy(vm)


def test_lost_records_are_noted_again(bench, vm):
    shutil.rmtree(vm.home.layout.private)
    assert {str(one.code) for one in bench.find(vm)} >= {"image-unrecorded", "folder-missing"}
    bench.repair(vm)
    assert frozen.is_recorded(vm.home.layout, frozen_at(vm, "a"))
    append(frozen_at(vm, "a"))
    assert "image-changed" in bench.codes(vm)


def test_file_that_stands_on_the_present_does_not_freeze_it(bench, vm):
    path = working(vm)
    stray = vm.home.layout.bases / "stray.qcow2"
    bench.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", path, stray)
    assert [one for one in bench.find(vm) if one.where == str(path)] == []
    bench.repair(vm)
    assert path.stat().st_mode & 0o200
    assert not frozen.is_recorded(vm.home.layout, path)
    assert frozen_at(vm, "b").stat().st_mode & 0o777 == 0o400
    stray.unlink()
    bench.healthy(vm)


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_note_that_the_present_is_frozen_is_forgotten(bench, vm, mode):
    layout, path = vm.home.layout, working(vm)
    frozen.record(layout, path)
    path.chmod(mode)
    assert [one.code for one in start_guard.refusals(start_guard.examine(vm.home.present()))] == ["image-frozen"]
    assert "image-not-writable" in bench.would(vm)
    assert bench.repair(vm) == ["image-not-writable"]
    assert start_guard.examine(vm.home.present()) == []
    assert frozen.is_recorded(layout, frozen_at(vm, "b")), "what a snapshot needs stays frozen"
    bench.healthy(vm)


def test_note_stays_where_a_snapshot_cannot_be_read(bench, vm):
    layout, path = vm.home.layout, working(vm)
    frozen.record(layout, path)
    file = layout.snapshot(vm.snapshot("b").id)
    file.write_bytes(b"nothing")
    assert "image-not-writable" not in bench.codes(vm)
    bench.host.repair(str(vm.path))
    assert frozen.is_recorded(layout, path)


# --- damaged ----------------------------------------------------------------------------------------------------------


def test_image_with_a_destroyed_header_is_set_aside_and_the_rest_works(bench, vm):
    before, path = bench.photo(vm), working(vm)
    with path.open("r+b") as file:
        file.write(bytes(4096))
    assert bench.one("image-unreadable", vm).where == str(path)
    with pytest.raises(errors.Corrupt):
        vm.snapshot("a").apply()
    assert "image-unreadable" in bench.repair(vm)
    assert bench.codes(vm) == {"image-missing"}
    vm.snapshot("b").apply(keep_undo=False)
    photo = bench.photo(vm)
    assert photo["now hda"] == before["b hda"]
    assert {name: photo[name] for name in before if name[0] in "ab"} == {
        name: before[name] for name in before if name[0] in "ab"
    }
    assert bench.codes(vm) == set()


def test_unreadable_file_that_nobody_needs_no_longer_blocks_the_vm(bench, vm):
    before, path = bench.photo(vm), vm.home.layout.image("hda", "00000000-0000-4000-8000-000000000000")
    path.write_bytes(b"nothing" * 100)
    assert "nothing needs it" in bench.one("image-unreadable", vm).sentence
    assert "image-unreadable" in bench.repair(vm)
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_encrypted_image_is_unsupported_and_stays(bench, vm):
    path = working(vm)
    with path.open("r+b") as file:
        file.seek(32)
        file.write((1).to_bytes(4, "big"))
    assert bench.one("image-unsupported", vm).where == str(path)
    bench.repair(vm)
    assert path.exists()


def test_corruption_inside_is_found_by_a_thorough_look(bench, vm):
    path = working(vm)
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[40:48], "big")
    data[table : table + 8] = (0x8000_0000_0000_0000 | 0x200).to_bytes(8, "big")
    path.write_bytes(data)
    assert bench.codes(vm) == set()
    assert "image-damaged" in bench.codes(vm, thorough=True)


def test_leaks_of_a_working_image_are_given_back(bench, vm):
    path, before = working(vm), bench.photo(vm)
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    used = len(data) // 65536
    data += bytes(65536)
    data[block + 2 * used : block + 2 * used + 2] = (1).to_bytes(2, "big")
    path.write_bytes(data)
    assert "image-leaks" in {str(one.code) for one in bench.find(vm, thorough=True)}
    assert "image-leaks" in bench.repair(vm, thorough=True)
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_chain_that_runs_in_a_circle_is_named(bench, vm):
    first, second = frozen_at(vm, "b"), working(vm)
    first.chmod(0o600)
    bench.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", second.name, "-F", "qcow2", first)
    first.chmod(0o400)
    assert "chain-circle" in bench.codes(vm)
    assert "image-changed" in bench.codes(vm)


def test_deep_chain_is_a_warning(bench, vm):
    layout, below = vm.home.layout, working(vm)
    for number in range(WARN_DEPTH):
        path = layout.image("hda", f"00000000-0000-4000-8000-{number:012}")
        bench.run("qemu-img", "create", "-f", "qcow2", "-b", below.name, "-F", "qcow2", path)
        below = path

    def change(edited):
        edited.set_disk_source("hda", below, "qcow2")

    bench.edit(vm, change)
    vm.create_snapshot("deep")
    assert "chain-deep" in bench.codes(vm)


# --- modes and owners -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choose", "mode", "code"),
    [
        pytest.param(lambda vm: frozen_at(vm, "a"), 0o600, "mode-wrong", id="frozen-writable"),
        pytest.param(lambda vm: frozen_at(vm, "a"), 0o444, "mode-wrong", id="frozen-readable-by-all"),
        pytest.param(working, 0o644, "mode-wrong", id="working-readable-by-all"),
        pytest.param(working, 0o400, "image-not-writable", id="working-read-only"),
        pytest.param(lambda vm: vm.home.layout.configuration, 0o644, "mode-wrong", id="configuration"),
        pytest.param(lambda vm: vm.home.layout.images, 0o700, "mode-wrong", id="folder-closed"),
        pytest.param(lambda vm: vm.path, 0o755, "mode-wrong", id="home-open"),
    ],
)
def test_wrong_mode_is_put_right(bench, vm, choose, mode, code):
    path = choose(vm)
    path.chmod(mode)
    assert bench.codes(vm) == {code}
    assert bench.would(vm) == [code]
    assert bench.repair(vm) == [code]
    bench.healthy(vm)


def test_mode_for_a_group_is_somebody_s_wish(bench, vm):
    vm.path.chmod(0o771)
    vm.home.layout.configuration.chmod(0o660)
    assert bench.codes(vm) == set()


def test_image_of_a_stranger_goes_back_to_qemu(bench, vm):
    path = working(vm)
    os.chown(path, 12345, 12345)
    assert bench.codes(vm) == {"owner-wrong"}
    assert bench.repair(vm) == ["owner-wrong"]
    bench.healthy(vm)


def test_closed_way_is_named_and_left_to_its_owner(bench, vm):
    bench.place.chmod(0o700)
    one = bench.one("way-closed", vm)
    assert one.where == str(bench.place)
    assert one.repair == f"chmod o+x '{bench.place}'"
    assert bench.repair(vm) == []
    bench.place.chmod(0o711)


# --- what waits, what nobody knows, what others need ------------------------------------------------------------------


def test_file_that_nobody_knows_is_kept_and_named(bench, vm):
    stray = vm.home.layout.images / "notes.txt"
    stray.write_text("hello")
    stray.chmod(0o600)
    overlay = vm.home.layout.images / "hda.backup"
    bench.run("qemu-img", "create", "-f", "qcow2", "-b", working(vm), "-F", "qcow2", overlay)
    overlay.chmod(0o600)
    found = {one.where: one.sentence for one in bench.find(vm) if one.code == "orphan"}
    assert set(found) == {str(stray), str(overlay)}
    assert f"it stands on {working(vm)}" in found[str(overlay)]
    assert bench.repair(vm) == []
    assert stray.exists()


def test_detached_disk_and_waiting_images_are_told(bench, vm):
    gone = working(vm, "hdb")

    def change(edited):
        (disk,) = [one for one in edited.root.findall("devices/disk") if one.find("target").get("dev") == "hdb"]
        disk.getparent().remove(disk)

    bench.edit(vm, change)
    vm.create_snapshot("c")
    assert bench.one("disk-detached", vm).where == str(gone)
    for name in ("d", "e"):
        vm.snapshot("b").apply()
        vm.create_snapshot(name)
    vm.snapshot("b").delete()
    assert bench.codes(vm) == set()
    assert "image-unnamed" in {str(one.code) for one in bench.find(vm)}


def test_merge_that_waits_is_told_with_its_command(bench, vm, monkeypatch):
    bench.start(vm)
    monkeypatch.setattr(merge, "merge_live", lambda *_: None)  # as if somebody else's job kept it from that
    vm.snapshot("b").delete()
    vm.stop(force=True)
    found = [one for one in bench.find(vm) if one.code == "merge-pending"]
    assert {one.repair for one in found} == {"hvmgr snapshot merge 'web'"}


def test_shared_base_names_the_other_vm_and_a_writer_is_an_error(bench):
    base = bench.image("base.qcow2", fill=(7,))
    vm = bench.make(bench.in_place(base))
    vm.create_snapshot("a")
    other = bench.make(bench.in_place(base), name="other")
    assert "other" in bench.one("image-shared", vm).sentence
    assert bench.codes() == set()
    current = other.now().disks["hda"]

    def change(edited):
        edited.set_disk_source("hda", base, "qcow2")

    bench.edit(other, change)
    one = bench.one("image-written", vm)
    assert "'other' writes to" in one.sentence
    assert one.where == str(base)
    assert current != str(base)


def test_index_that_lost_a_base_outside_is_rebuilt_from_the_home(bench):
    base = bench.image("base.qcow2", fill=(7,))
    vm = bench.make(bench.in_place(base))
    vm.create_snapshot("a")
    index.record(index.Entry(vm.id, "web", vm.path, bench.uri, ()))
    assert str(base) in bench.one("index-missing", vm).sentence
    assert bench.repair(vm) == ["index-missing"]
    assert index.entries()[0].outside == (str(base),)


# --- what others did below the present --------------------------------------------------------------------------------


def test_pulled_data_is_taken_over(bench, vm):
    before, path = bench.photo(vm), working(vm)
    bench.run("qemu-img", "rebase", "-f", "qcow2", "-b", "", path)
    assert "image-swapped" in bench.codes(vm)
    bench.repair(vm)
    assert bench.photo(vm) == before
    assert bench.codes(vm) == set()


def test_committed_data_marks_the_snapshot_and_the_present_goes_on(bench, vm):
    before, path, base = bench.photo(vm), working(vm), frozen_at(vm, "b")
    base.chmod(0o600)
    bench.run("qemu-img", "commit", "-d", "-f", "qcow2", path)
    base.chmod(0o400)
    assert bench.codes(vm) & {"image-changed", "image-touched"}
    bench.repair(vm)
    after = bench.photo(vm)
    assert {name: after[name] for name in before if name[0] in "an"} == {
        name: before[name] for name in before if name[0] in "an"
    }
    assert bench.codes(vm) == {"snapshot-written"}
    vm.snapshot("b").delete()
    assert bench.codes(vm) == set()


def test_chain_that_nobody_can_explain_is_accepted_on_the_user_s_word(bench, vm):
    path = working(vm)
    bench.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", path)
    seen = bench.bytes_of(path)
    assert "image-swapped" not in bench.repair(vm)
    with pytest.raises(errors.Conflict):
        vm.create_snapshot("c")
    assert "image-swapped" in bench.repair(vm, accept_present=True)
    assert bench.photo(vm)["now hda"] == seen
    assert bench.codes(vm) == set()
    vm.create_snapshot("c")
