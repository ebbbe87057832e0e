"""Starting and stopping a VM with a real guest in it."""

from __future__ import annotations

import pytest

from hvmgr import errors

pytestmark = pytest.mark.guest


def test_stop_asks_the_guest_and_loses_nothing(machine):
    late = machine.tick()
    assert machine.vm.stop()
    assert machine.state() == "off"
    assert machine.held() >= late.memory
    assert not machine.vm.stop()
    assert machine.vm.start()
    assert not machine.vm.start()
    machine.check()


def test_guest_that_does_not_listen_is_stopped_by_force(make_machine):
    machine = make_machine(running=False)
    machine.vm.start()
    with pytest.raises(errors.Conflict, match="did not shut down within 0 seconds") as failure:
        machine.vm.stop(timeout_s=0.1)
    assert "--force" in failure.value.hint
    assert machine.vm.stop(force=True)
    assert machine.state() == "off"


def test_paused_vm_is_started_by_going_on_and_not_stopped_by_its_guest(machine):
    machine.domain.suspend()
    with pytest.raises(errors.Conflict, match="paused") as failure:
        machine.vm.stop()
    assert "--force" in failure.value.hint
    assert machine.vm.start()
    machine.tick()


def test_saved_vm_is_started_where_it_was(machine):
    late = machine.tick()
    machine.domain.managed_save()
    assert machine.vm.start()
    assert machine.tick().memory > late.memory
    machine.check()
