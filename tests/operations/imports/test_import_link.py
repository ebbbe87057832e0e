"""Linked imports: no disk data is copied, the gold is never written, and its users are known."""

from __future__ import annotations

import json
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
