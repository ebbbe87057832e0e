"""``import --replace`` of a VM that was exported with its memory: it goes on from there, as often as wanted."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.model import plan

pytestmark = pytest.mark.guest


@pytest.fixture
def out(factory):
    folder = Path(tempfile.mkdtemp(prefix="out", dir=factory.folder))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def replace(machine, folder, **options):
    machine.host.import_vm(folder, hvmgr.ImportOptions(new_id=False, replace=True, **options))


def starts_at(machine):
    """The count on the disk of a saved VM, from which it then goes on."""
    assert machine.state() == "saved"
    count = machine.held()
    machine.domain.start(paused=True)
    assert machine.first_tick().follows(count)
    return count


@pytest.fixture
def exported(machine, out):
    """A running machine, and its export with memory from a while ago."""
    machine.vm.create_snapshot("one", type="disk-only")
    folder = machine.vm.export(out, hvmgr.ExportOptions(with_state=True))
    machine.run_for(3)
    return machine, folder


def test_guest_goes_on_from_the_exported_moment_as_often_as_wanted(exported):
    machine, folder = exported
    counts = []
    for number in range(2):
        replace(machine, folder)
        machine.check()
        machine.vm.create_snapshot(f"saved {number}")  # the memory goes along with the disks
        machine.check()
        counts.append(starts_at(machine))
        machine.run_for(3)
        machine.check()
    assert counts[0] == counts[1]


def test_what_was_there_is_in_the_undo_slot(exported, at_step):
    machine, folder = exported
    machine.domain.managed_save()
    held = machine.held()
    replace(machine, folder)
    machine.check()
    assert machine.held() < held
    machine.vm.undo()
    machine.check()
    assert (machine.state(), machine.held()) == ("off", held)
    save = machine.host.connection.managed_save_path(machine.vm.name)
    at_step(plan.PutManagedSave, before=lambda: save.write_bytes(b"somebody else's"))
    with pytest.raises(errors.Conflict, match="made by somebody else"):
        replace(machine, folder)
    assert save.read_bytes() == b"somebody else's"
    save.unlink()
    machine.check()
    assert (machine.state(), machine.held()) == ("off", held)
    replace(machine, folder, without_state=True)
    machine.check()
    assert machine.state() == "off"
    assert machine.held() < held


def test_old_memory_comes_back_after_a_death(exported, kill_at, run_and_die):
    machine, folder = exported
    machine.domain.managed_save()
    held = machine.held()
    kill_at(plan.PutManagedSave, after=True)
    run_and_die(replace, machine, folder)
    machine.vm.now()
    machine.check()
    assert starts_at(machine) == held


def test_guest_that_was_started_after_a_death_stays_in_the_new_state(exported, kill_at, run_and_die):
    machine, folder = exported
    kill_at(plan.PutManagedSave, after=True)
    run_and_die(replace, machine, folder)
    save = machine.host.connection.managed_save_path(machine.vm.name)
    assert saved_state.read(save).complete
    machine.domain.start()
    tick = machine.run_for(2)
    machine.domain.destroy()
    machine.vm.now()
    machine.check()
    assert machine.state() == "off"
    assert machine.held() >= tick.memory - 1  # it is written after the word
