"""Apply, revert and undo put back everything that belongs to a VM: firmware variables, TPM, media, identity."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import configuration

MIB = 1 << 20


# --- undo -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vm(bench):
    """Snapshots a and b in a row, now below b with something of its own."""
    return bench.kept(with_a_and_b)


def with_a_and_b(bench):
    vm = bench.make(4)
    bench.write(vm, 1)
    vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    vm.create_snapshot("b")
    bench.write(vm, 3, 2 * MIB)
    return vm


def test_undo_after_apply_and_again(bench, vm):
    seen, place = bench.photo(vm), vm.now()
    assert not vm.can_undo()
    vm.snapshot("a").apply()
    bench.write(vm, 7)
    second, second_place = bench.photo(vm)["now hda"], vm.now()
    for _ in range(2):
        assert vm.can_undo()
        vm.undo()
        assert (bench.photo(vm), vm.now()) == (seen, place)
        bench.check(vm)
        vm.undo()
        assert (bench.photo(vm)["now hda"], vm.now()) == (second, second_place)
        bench.check(vm)


def test_undo_after_revert(bench, vm):
    seen = bench.photo(vm)
    assert vm.revert().name == "b"
    assert bench.photo(vm)["now hda"] == seen["b hda"]
    assert vm.now().parent == vm.snapshot("b").id
    vm.undo()
    assert bench.photo(vm) == seen


def test_second_apply_replaces_what_the_slot_held(bench, vm):
    vm.snapshot("a").apply()
    first = vm.tree().undo.disks["hda"]
    bench.write(vm, 8)
    seen = bench.photo(vm)
    vm.snapshot("b").apply()
    assert not Path(first).exists()
    vm.undo()
    assert bench.photo(vm) == seen
    bench.check(vm)


@pytest.mark.parametrize(
    "act",
    [
        lambda vm: vm.create_snapshot("c"),
        lambda vm: vm.snapshot("b").delete(),
        lambda vm: vm.snapshot("a").delete(subtree=True),
        lambda vm: vm.snapshot("b").apply(keep_undo=False),
    ],
    ids=["create", "delete", "delete subtree", "apply --no-undo"],
)
def test_next_snapshot_operation_empties_the_slot(bench, vm, act):
    vm.snapshot("a").apply()
    away, seen = vm.tree().undo.disks["hda"], bench.photo(vm)
    act(vm)
    assert not vm.can_undo()
    assert not Path(away).exists()
    assert vm.tree().undo is None
    with pytest.raises(errors.NotFound, match="nothing to undo"):
        vm.undo()
    assert {
        name: value for name, value in bench.photo(vm).items() if name in seen and name[0] == "a"
    }.items() <= seen.items()
    bench.check(vm)


def test_renames_and_starts_leave_the_slot(bench, vm):
    seen = bench.photo(vm)
    vm.snapshot("a").apply()
    vm.rename("other")
    vm.snapshot("a").rename("first")
    vm.snapshot("b").set_notes("text")
    vm.undo()
    assert vm.name == "other"
    assert bench.photo(vm)["now hda"] == seen["now hda"]
    bench.check(vm)


def test_no_undo_removes_the_present(bench, vm):
    away = vm.now().disks["hda"]
    vm.snapshot("a").apply(keep_undo=False)
    assert not Path(away).exists()
    assert not vm.can_undo()
    bench.check(vm)


def test_base_that_was_the_present_is_kept_by_no_undo(bench):
    """A present that writes to a base (after the only snapshot went) is never thrown away with --no-undo."""
    vm = bench.make(4)
    bench.write(vm, 5)
    first = vm.create_snapshot("a")
    other = bench.image("other.qcow2", fill=(9,))
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", other, "qcow2"))
    first.apply(keep_undo=False)
    assert other.exists()
    bench.check(vm)


def test_snapshot_first_keeps_the_present_as_a_snapshot(bench, vm):
    seen = bench.photo(vm)
    first = vm.snapshot("a").apply(snapshot_first=True)
    assert first.parent == vm.snapshot("b").id
    after = bench.photo(vm)
    assert after[f"{first.name} hda"] == seen["now hda"]
    assert after["now hda"] == seen["a hda"]
    first.apply()
    assert bench.photo(vm)["now hda"] == seen["now hda"]
    bench.check(vm)


# --- identity ---------------------------------------------------------------------------------------------------------


def test_name_and_id_stay_and_the_generation_id_is_new(bench, vm):
    ids = [vm.home.present().genid]
    vm.rename("other")
    vm.snapshot("a").apply()
    present = vm.home.present()
    assert (present.name, present.uuid) == ("other", vm.id)
    ids.append(present.genid)
    vm.undo()
    ids.append(vm.home.present().genid)
    vm.revert()
    ids.append(vm.home.present().genid)
    assert len(set(ids)) == 4
    assert vm.home.present().name == "other"
    bench.check(vm)


# --- drives without snapshots -----------------------------------------------------------------------------------------


def test_cdrom_takes_no_part_and_a_medium_that_is_gone_is_ejected(bench):
    iso = bench.image("boot.iso", fmt="raw", fill=(3,))
    iso.chmod(0o644)
    vm = bench.make(4, cdrom=iso)
    state = bench.file_of(iso), bench.mode_of(iso)
    first = vm.create_snapshot("a")
    assert set(first.disks) == {"hda"}
    assert (bench.file_of(iso), bench.mode_of(iso)) == state
    first.apply()
    drive = next(disk for disk in vm.home.present().disks() if disk.device == "cdrom")
    assert drive.source == str(iso)
    iso.unlink()
    bench.said.clear()
    first.apply()
    assert f"{iso} is gone: {drive.slot} is empty now" in bench.said
    drive = next(disk for disk in vm.home.present().disks() if disk.device == "cdrom")
    assert drive.source is None
    bench.start(vm)
    vm.stop(force=True)
    bench.check(vm)


EXTRA = """<disk type='file' device='{device}'>{options}<driver name='qemu' type='raw'/><source file='{path}'/>
<target dev='{slot}' bus='{bus}'/>{more}</disk>"""


def add(bench, vm, **facts):
    facts = {"options": "", "more": "", "device": "disk", "bus": "ide"} | facts
    xml = bench.domain(vm).xml(live=False)
    head, tail = xml.split("<devices>", 1)
    attribute = facts.pop("attribute", "")
    disk = EXTRA.format(**facts).replace("<disk ", f"<disk {attribute} ", 1)
    bench.host.connection.define(f"{head}<devices>{disk}{tail}")


@pytest.mark.parametrize(
    "facts",
    [
        {"device": "floppy", "slot": "fda", "bus": "fdc"},
        {"slot": "sda", "bus": "scsi", "more": "<readonly/>"},
        {"slot": "hdb", "attribute": "snapshot='no'"},
    ],
    ids=["floppy", "read-only", "left out"],
)
def test_drive_that_takes_no_part_is_left_alone(bench, facts):
    vm, image = bench.make(4), bench.image("extra.img", fmt="raw", fill=(4,))
    image.chmod(0o644)
    add(bench, vm, path=image, **facts)
    state = bench.file_of(image), bench.mode_of(image)
    first = vm.create_snapshot("a")
    second = vm.create_snapshot("b")
    assert set(second.disks) == {"hda"}
    first.apply()
    vm.undo()
    second.delete()
    assert facts["slot"] in [disk.slot for disk in vm.home.present().disks()]
    bench.check(vm)
    vm.delete(with_disks=True)
    assert (bench.file_of(image), bench.mode_of(image)) == state


def test_shareable_disk_is_refused(bench):
    vm, image = bench.make(4), bench.image("extra.img", fmt="raw", fill=(4,))
    image.chmod(0o644)
    add(bench, vm, path=image, slot="hdb", more="<shareable/>")
    with pytest.raises(errors.Unsupported, match="disk hdb is shareable"):
        vm.create_snapshot("a")
    assert bench.mode_of(image) == 0o644


# --- firmware ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def uefi(bench):
    """A VM with UEFI variables and a TPM, as after its first start; both hold what a test puts there."""
    vm = bench.make(4, template="generation2", tpm=True)
    if not vm.home.present().nvram or not vm.home.present().has_tpm:
        pytest.skip("this host has no UEFI firmware or no swtpm")
    return vm


def nvram(vm):
    return vm.home.present().nvram


def tpm(bench, vm):
    return bench.host.connection.tpm_folder(vm.id) / "tpm2" / "tpm2-00.permall"


def put(bench, vm, text):
    nvram(vm).write_text(text)
    file = tpm(bench, vm)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def get(bench, vm):
    return nvram(vm).read_text(), tpm(bench, vm).read_text()


def test_firmware_state_comes_back_with_apply_and_undo(bench, uefi):
    put(bench, uefi, "one")
    a = uefi.create_snapshot("a")
    assert get(bench, uefi) == ("one", "one")
    put(bench, uefi, "two")
    b = uefi.create_snapshot("b")
    put(bench, uefi, "three")
    a.apply()
    assert get(bench, uefi) == ("one", "one")
    put(bench, uefi, "four")
    uefi.undo()
    assert get(bench, uefi) == ("three", "three")
    uefi.undo()
    assert get(bench, uefi) == ("four", "four")
    b.apply()
    assert get(bench, uefi) == ("two", "two")
    uefi.revert(keep_undo=False)
    assert get(bench, uefi) == ("two", "two")
    a.apply()
    assert get(bench, uefi) == ("one", "one")
    bench.check(uefi)


def test_firmware_files_never_pile_up(bench, uefi):
    put(bench, uefi, "one")
    a = uefi.create_snapshot("a")
    for _ in range(3):
        a.apply()
        uefi.undo()
    uefi.create_snapshot("b")
    folder = uefi.home.layout.vm_folder
    assert [path.name for path in folder.iterdir()] == [nvram(uefi).name]
    assert not uefi.can_undo()
    for one in uefi.snapshots():
        one.delete()
    assert get(bench, uefi) == ("one", "one")
    uefi.delete()
    assert not tpm(bench, uefi).exists()
    assert not folder.exists()


def test_snapshot_before_the_first_start_has_no_firmware_state(bench, uefi):
    a = uefi.create_snapshot("a")
    put(bench, uefi, "one")
    a.apply()
    assert not nvram(uefi).exists()
    assert not tpm(bench, uefi).exists()
    uefi.undo()
    assert get(bench, uefi) == ("one", "one")


def test_snapshot_xml_defined_by_hand_does_not_write_to_the_snapshots_variables(bench, uefi):
    put(bench, uefi, "one")
    a = uefi.create_snapshot("a")
    bench.host.connection.define(uefi.home.snapshot(a.id).to_xml())
    uefi.create_snapshot("b")
    nvram(uefi).write_text("two")
    a.apply()
    assert nvram(uefi).read_text() == "one"


def test_real_firmware_and_tpm_start_from_what_an_apply_put_back(bench, uefi):
    bench.start(uefi)
    uefi.stop(force=True)
    first = get_bytes(bench, uefi)
    assert all(first)
    a = uefi.create_snapshot("a")
    put(bench, uefi, "damaged")
    a.apply()
    assert get_bytes(bench, uefi) == first
    bench.start(uefi)
    assert bench.domain(uefi).state() is State.RUNNING
    uefi.stop(force=True)
    bench.check(uefi)


def get_bytes(bench, vm):
    return nvram(vm).read_bytes(), tpm(bench, vm).read_bytes()


def test_rename_keeps_firmware_and_snapshots(bench, uefi):
    put(bench, uefi, "one")
    a = uefi.create_snapshot("a")
    uefi.rename("other")
    put(bench, uefi, "two")
    a.apply()
    assert get(bench, uefi) == ("one", "one")
    xml = configuration.parse(bench.domain(uefi).xml(live=False), source="libvirt")
    assert xml.name == "other"
    assert re.fullmatch(r"nvram_[0-9a-f-]{36}\.fd", xml.nvram.name)
