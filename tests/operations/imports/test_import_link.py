"""Linked imports: no disk data is copied, the gold is never written, and its users are known."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.storage import index

LINK = hvmgr.Mode.LINK


def content(folder):
    return {path: (path.read_bytes(), path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_several_links_on_one_gold(bench, branched):
    before = bench.photo(branched)
    gold = bench.take_away(branched)
    files = content(gold)
    vms = [bench.bring(gold, mode=LINK, name=f"web{number}") for number in range(3)]
    for number, vm in enumerate(vms):
        assert {Path(path).parent for path in vm.now().disks.values()} == {vm.home.layout.images}
        bench.write(vm, number + 1, 3 << 20)
    assert len({bench.photo(vm)["now hda"][1][3 << 20] for vm in vms}) == 3
    for vm in vms[:2]:
        assert {key: one for key, one in bench.photo(vm).items() if key != "now hda"} == {
            key: one for key, one in before.items() if key != "now hda"
        }
        bench.check(vm)
    assert content(gold) == files


def test_every_snapshot_stays_applicable(bench, branched):
    before = bench.photo(branched)
    gold = bench.take_away(branched)
    files = content(gold)
    vm = bench.bring(gold, mode=LINK)
    for name in ("three", "one", "left"):
        vm.snapshot(name).apply()
        assert bench.photo(vm)["now hda"] == before[f"{name} hda"]
        bench.check(vm)
    vm.create_snapshot("mine")
    vm.snapshot("one").delete()
    vm.snapshot("mine").delete()
    vm.delete(with_disks=True)
    assert content(gold) == files


def test_dependency_is_known_on_both_sides(bench, branched):
    gold = bench.take_away(branched)
    vm = bench.bring(gold, mode=LINK, name="linked")
    (entry,) = [one for one in index.entries() if one.vm_id == vm.id]
    assert {str(Path(path).parent.parent) for path in entry.outside} <= {str(gold), str(gold / "Snapshots")}
    note = json.loads((gold.parent / ".web.hvmgr-links" / f"{vm.id}.json").read_text())
    assert (note["name"], note["home"]) == ("linked", str(vm.path))


@pytest.fixture
def linked(bench, branched):
    """A gold, and a VM that is linked to it."""
    gold = bench.take_away(branched)
    return gold, bench.bring(gold, mode=LINK, name="linked")


def require_unregistered(bench, gold, user):
    files = content(gold)
    with pytest.raises(errors.Conflict, match=user):
        bench.bring(gold, mode=hvmgr.Mode.REGISTER)
    assert content(gold) == files


def test_gold_with_users_does_not_become_a_vm(bench, linked):
    """Its guest would write to what they stand on."""
    gold, vm = linked
    require_unregistered(bench, gold, "VM linked stands on")
    bench.check(vm)


def test_gold_with_users_that_only_their_notes_know(bench, linked, monkeypatch):
    gold, vm = linked
    monkeypatch.setenv("HVMGR_INDEX", str(bench.place / "another index"))
    require_unregistered(bench, gold, "VM linked stands on")
    note = gold.parent / ".web.hvmgr-links" / f"{vm.id}.json"
    note.write_text(note.read_text().replace(socket.gethostname(), "faraway"))
    require_unregistered(bench, gold, "VM linked on faraway")
    note.write_text("{")
    require_unregistered(bench, gold, f"VM {vm.id} .by ")


def test_gold_that_nobody_uses_any_more_becomes_a_vm(bench, linked):
    gold, vm = linked
    other = bench.bring(gold, mode=LINK, name="other")
    vm.delete(with_disks=True)
    other.localize("hda")
    assert list((gold.parent / ".web.hvmgr-links").iterdir()) == []
    assert bench.codes(gold, mode=hvmgr.Mode.REGISTER) == ["export-used-up"]


def test_home_whose_snapshots_others_share_can_be_registered_again(bench, branched):
    """Frozen images are not written, and who needs them is counted; only other names would break the links."""
    before = bench.photo(branched.clone("other", hvmgr.CloneOptions(snapshot="two", linked=True)))
    bench.domain(branched).undefine()
    assert bench.codes(branched.path, mode=hvmgr.Mode.REGISTER, new_id=True) == ["source-shared"]
    vm = bench.bring(branched.path, mode=hvmgr.Mode.REGISTER)
    bench.check(vm)
    assert bench.photo(bench.host.vm("other")) == before


def test_gold_that_can_be_written_is_refused(bench, branched):
    folder = bench.copy(branched)
    assert "source-writable" in bench.codes(folder, mode=LINK, name="new")


def test_changed_gold_is_seen(bench, branched):
    gold = bench.take_away(branched)
    vm = bench.bring(gold, mode=LINK)
    (path,) = vm.snapshot("two").disks.values()
    Path(path).chmod(0o600)
    bench.write_image(path, 0x99)
    with pytest.raises(errors.Corrupt):
        vm.snapshot("two").apply()


def test_time_does_not_depend_on_size(bench):
    """1 MiB and 1 TiB: the same, within what a busy machine does."""
    times = {}
    for name, size in (("small", 1), ("large", 1 << 20)):
        gold = bench.take_away(bench.make(size, name=name))
        started = time.monotonic()
        bench.bring(gold, mode=LINK, name=f"{name}2")
        times[name] = time.monotonic() - started
    assert times["large"] < times["small"] * 3 + 0.5


def test_link_copies_no_disk_and_says_so(bench, branched):
    gold = bench.take_away(branched)
    for wish in ({"disk_path": "/x"}, {"disk_targets": {"hda": "/x"}}):
        with pytest.raises(errors.UsageError):
            bench.bring(gold, mode=LINK, **wish)
