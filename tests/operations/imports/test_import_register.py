"""Registering: the folder becomes the home where it lies, or stays what it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.operations.exchange import registering
from hvmgr.storage import locks


@pytest.fixture
def with_undo(bench, branched):
    """The tree with a present that was put away."""
    branched.snapshot("three").apply()
    bench.write(branched, 0x99, 3 << 20)
    return branched


def test_export_becomes_the_home(bench, with_undo):
    branched = with_undo
    before, tree, vm_id = bench.photo(branched), bench.tree(branched), branched.id
    source = bench.take_away(branched)
    assert bench.codes(source, mode=hvmgr.Mode.REGISTER) == ["export-used-up"]
    vm = bench.bring(source, mode=hvmgr.Mode.REGISTER)
    assert (vm.path, vm.id, vm.name) == (source, vm_id, "web")
    assert bench.photo(vm) == before
    assert bench.tree(vm) == tree
    assert not (source / "export.yaml").exists()
    bench.check(vm)
    found = bench.host.vm("web")
    found.undo()
    found.snapshot("three").apply()
    found.snapshot("one").delete()
    bench.check(found)


def test_new_id_renames_what_is_named_by_ids(bench, with_undo):
    branched = with_undo
    before, vm_id = bench.photo(branched), branched.id
    ids = {one.id for one in branched.snapshots()}
    source = bench.take_away(branched)
    vm = bench.bring(source, mode=hvmgr.Mode.REGISTER, new_id=True, name="other")
    assert (vm.id == vm_id, vm.name, vm.path) == (False, "other", source)
    assert ids.isdisjoint(one.id for one in vm.snapshots())
    names = " ".join(str(path) for path in source.rglob("*"))
    assert vm_id not in names
    assert not any(one in names for one in ids)
    assert bench.photo(vm) == before
    bench.check(vm)
    vm.undo()
    bench.check(vm)


def test_moved_home_is_registered_on_a_host_that_forgot_it(bench, branched):
    before = bench.photo(branched)
    moved = bench.copy(branched)
    bench.domain(branched).undefine()
    branched.path.rename(bench.place / "away")
    vm = bench.bring(moved, mode=hvmgr.Mode.REGISTER)
    assert bench.photo(vm) == before
    assert str(moved) in vm.home.present().to_xml()
    bench.check(vm)


def test_absolute_names_of_parents_are_mended(bench, branched):
    folder = bench.copy(branched)
    images = sorted((folder / "Snapshots").glob("*/*.qcow2"))
    for path in images:
        parent = bench.run("qemu-img", "info", path).split("backing file: ")[1].split(" (")[0].split("\n")[0]
        absolute = branched.home.layout.images / parent
        path.chmod(0o600)
        bench.run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", absolute.resolve(), path)
    before = bench.photo(branched)
    branched.delete(with_disks=True)
    vm = bench.bring(folder, mode=hvmgr.Mode.REGISTER)
    assert bench.photo(vm) == before
    bench.check(vm)


def test_refusal_leaves_the_folder_as_it_was(bench, branched):
    source = bench.make_export(bench.copy(branched))
    before = bench.states()
    with pytest.raises(errors.Conflict):
        bench.bring(source, mode=hvmgr.Mode.REGISTER)
    assert bench.states() == before


def test_failure_leaves_the_folder_as_it_was(bench, branched, monkeypatch):
    source = bench.take_away(branched)
    before = bench.states()
    content = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}

    def refuse(*_):
        raise errors.HostFailed("no")

    from hvmgr.operations.steps import execution

    monkeypatch.setitem(execution.DO, hvmgr.operations.steps.execution.plan.Define, refuse)
    with pytest.raises(errors.HostFailed):
        bench.bring(source, mode=hvmgr.Mode.REGISTER, new_id=True)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == content
    assert {path: mode for path, (mode, _) in bench.states()[0].items() if path.is_relative_to(source)} == {
        path: mode for path, (mode, _) in before[0].items() if path.is_relative_to(source)
    }


@pytest.mark.parametrize("wish", [{"vm_path": "/x"}, {"disk_targets": {"hda": "/x"}}, {"disks": {"hda": "/x"}},
                                  {"without_snapshots": True}, {"snapshot_source": "/x"}])  # fmt: skip
def test_value_that_would_be_ignored_is_refused(bench, branched, wish):
    source = bench.take_away(branched)
    with pytest.raises(errors.UsageError):
        bench.bring(source, mode=hvmgr.Mode.REGISTER, **wish)


@pytest.mark.parametrize("new_id", [True, False])
def test_folder_that_somebody_else_has_just_registered(bench, branched, monkeypatch, new_id):
    source, made = bench.take_away(branched, export=False), []

    def held(*where, **how):
        monkeypatch.undo()
        made.append(bench.bring(source, mode=hvmgr.Mode.REGISTER))
        return locks.held(*where, **how)

    monkeypatch.setattr(registering, "locks", SimpleNamespace(held=held))
    with pytest.raises(errors.Conflict, match="meanwhile"):
        bench.bring(source, mode=hvmgr.Mode.REGISTER, new_id=new_id, name="late")
    bench.check(made[0])
    assert [one.name for one in bench.host.vms()] == ["web"]
