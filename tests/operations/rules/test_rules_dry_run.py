"""A dry run changes nothing: not even what another command would set right first."""

from __future__ import annotations

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.model import plan
from hvmgr.storage import journal


@pytest.fixture
def dry(bench):
    """A VM, and the same VM on a host that only plans."""
    vm = bench.make(1)
    reporter = hvmgr.Reporter(approve=lambda _: False, dry_run=True)
    with hvmgr.Host.open(vm.host.uri, root=vm.host.root, reporter=reporter) as host:
        yield vm, host.vm(vm.name)


def test_plan_is_declined_and_nothing_changed(bench, dry):
    vm, planned = dry
    before = bench.files(vm)
    with pytest.raises(errors.Declined):
        planned.create_snapshot("a")
    assert bench.files(vm) == before


def test_interrupted_operation_is_left_alone(bench, dry):
    vm, planned = dry
    open_plan = plan.Plan(plan_id="p", vm_id=vm.id, operation="snapshot merge", subject="merge of v")
    journal.begin(vm.home.layout.journal, open_plan)
    before = bench.files(vm)
    with pytest.raises(errors.Conflict, match="interrupted operation"):
        planned.create_snapshot("a")
    assert bench.files(vm) == before
    vm.create_snapshot("b")
    assert not vm.home.layout.journal.exists()


def test_change_by_others_is_left_alone(bench, dry):
    vm, planned = dry
    present = vm.home.present()
    present.root.remove(present.root.find("metadata"))
    vm.host.connection.define(present.to_xml())
    before = bench.files(vm)
    with pytest.raises(errors.Conflict, match="outside hvmgr"):
        planned.create_snapshot("a")
    assert bench.files(vm) == before
