"""Memory that is saved while the guest goes on: memory and disks of one instant."""

from __future__ import annotations

import pytest

from hvmgr.host import saved_state
from hvmgr.model.metadata import SavedState

pytestmark = pytest.mark.guest


def test_guest_goes_on_and_comes_back_to_the_instant(machine):
    before = machine.tick()
    snapshot = machine.vm.create_snapshot("one", fallback=False)
    after = machine.tick()
    assert snapshot.state is SavedState.RUNNING
    assert before.memory - 1 <= machine.count_of(snapshot) < after.memory
    assert machine.state() == "running"
    machine.check()
    machine.run_for(5)
    print(saved_state.read(machine.layout.memory(snapshot.id)).cookie)
    snapshot.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()
    assert machine.said == []
