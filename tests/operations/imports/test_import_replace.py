"""``--keep-id --replace``: an export comes back in the place of the VM, whose present is kept in the undo slot."""

from __future__ import annotations

import pytest

from hvmgr import errors


def test_export_replaces_the_present_as_often_as_wanted(bench, branched):
    exported = bench.photo(branched)["now hda"]
    source = bench.make_export(bench.copy(branched))
    tree = bench.tree(branched)
    for number in (1, 2):
        bench.write(branched, 0x30 + number, 3 << 20)
        changed = bench.photo(branched)["now hda"]
        vm = bench.bring(source, new_id=False, replace=True)
        assert vm.id == branched.id
        assert bench.photo(vm)["now hda"] == exported
        assert bench.tree(vm) == tree
        bench.check(vm)
        vm.undo()
        assert bench.photo(vm)["now hda"] == changed
        vm.undo()
        assert bench.photo(vm)["now hda"] == exported


def test_snapshots_that_were_deleted_come_back(bench, branched):
    before, tree = bench.photo(branched), bench.tree(branched)
    source = bench.make_export(bench.copy(branched))
    branched.snapshot("one").delete(subtree=True)
    vm = bench.bring(source, new_id=False, replace=True)
    assert bench.tree(vm) == tree
    assert bench.photo(vm) == before
    bench.check(vm)
    vm.snapshot("two").apply()
    vm.snapshot("one").delete()
    bench.check(vm)


def test_snapshots_that_are_newer_stay(bench, branched):
    source = bench.make_export(bench.copy(branched))
    branched.create_snapshot("newer")
    newer = bench.photo(branched)["newer hda"]
    vm = bench.bring(source, new_id=False, replace=True)
    assert {one.name for one in vm.snapshots()} == {"one", "two", "three", "left", "newer"}
    assert bench.photo(vm)["newer hda"] == newer
    bench.check(vm)


def test_nothing_to_replace(bench, branched):
    source = bench.take_away(branched)
    with pytest.raises(errors.NotFound):
        bench.bring(source, new_id=False, replace=True)


def test_vm_that_libvirt_has_forgotten_is_replaced(bench, branched):
    source = bench.make_export(bench.copy(branched))
    bench.domain(branched).undefine()
    vm = bench.bring(source, new_id=False, replace=True)
    bench.check(vm)


def test_running_vm_is_put_away(bench, branched):
    source = bench.make_export(bench.copy(branched))
    bench.start(branched)
    vm = bench.bring(source, new_id=False, replace=True)
    assert str(vm.state()) == "off"
    assert vm.can_undo()
    bench.check(vm)


@pytest.mark.parametrize("wish", [{}, {"new_id": True}, {"new_id": False, "name": "x"}])
def test_contradictions_are_refused(bench, branched, wish):
    source = bench.copy(branched)
    with pytest.raises(errors.UsageError):
        bench.bring(source, replace=True, **wish)
