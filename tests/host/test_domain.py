from __future__ import annotations

import pytest

from hvmgr.errors import Conflict, NotFound
from hvmgr.host.hypervisor import State


@pytest.fixture
def base(make_image):
    return make_image("base.qcow2")


@pytest.fixture
def domain(connection, make_xml, base):
    return connection.define(make_xml("guest", [("vda", "qcow2", base)]))


def source_of(xml):
    from lxml import etree

    return [node.get("file") for node in etree.fromstring(xml).iterfind("devices/disk/source")]


def test_start_suspend_resume_destroy_show_their_states(domain):
    assert domain.state() is State.OFF
    domain.start()
    assert domain.state() is State.RUNNING
    domain.suspend()
    assert domain.state() is State.PAUSED
    domain.resume()
    assert domain.state() is State.RUNNING
    domain.destroy()
    assert domain.state() is State.OFF


def test_start_paused(domain):
    domain.start(paused=True)
    assert domain.state() is State.PAUSED


def test_destroy_of_a_stopped_domain_is_fine(domain):
    domain.destroy()
    assert domain.state() is State.OFF


def test_start_of_a_running_domain_is_a_conflict(domain):
    domain.start()
    with pytest.raises(Conflict, match="already running"):
        domain.start()


def test_call_on_an_undefined_domain_is_not_found(domain):
    domain.undefine()
    with pytest.raises(NotFound):
        domain.start()


@pytest.mark.parametrize(("running", "state"), [(True, State.RUNNING), (False, State.PAUSED)], ids=["run", "pause"])
def test_save_and_restore(connection, domain, folder, running, state):
    domain.start()
    xml = domain.migratable_xml()
    domain.save(folder / "memory.save")
    assert domain.state() is State.OFF
    connection.restore(folder / "memory.save", xml, running=running)
    assert domain.state() is state


def test_save_reports_progress(domain, folder):
    calls = []
    domain.start()
    domain.save(folder / "memory.save", progress=lambda done, total: calls.append((done, total)))
    assert all(done <= total or total == 0 for done, total in calls)


def test_interrupted_save_leaves_the_guest_running(domain, folder):
    def interrupt(_done, _total):
        raise KeyboardInterrupt

    domain.start()
    try:
        domain.save(folder / "memory.save", progress=interrupt)
    except KeyboardInterrupt:
        assert domain.state() in {State.RUNNING, State.OFF}  # the save may have been quicker


def test_switch_disks_alone(domain, base, make_image):
    child = make_image("child.qcow2", backing=base)
    domain.start()
    domain.switch_disks({"vda": child})
    assert source_of(domain.xml(live=False)) == [str(child)]
    assert source_of(domain.xml(live=True)) == [str(child)]
    assert domain.writable_files() == {child}
    assert domain.snapshot_count() == 0


def test_switch_disks_with_memory_restores_on_another_child(connection, domain, base, make_image, folder):
    first, second = make_image("first.qcow2", backing=base), make_image("second.qcow2", backing=base)
    domain.start()
    xml = domain.migratable_xml()
    domain.switch_disks({"vda": first}, memory=folder / "memory.save")
    assert domain.state() is State.RUNNING
    domain.destroy()
    connection.restore(folder / "memory.save", xml.replace(str(base), str(second)), running=True)
    assert domain.writable_files() == {second}
