"""The same connection against a daemon: what differs from the embedded driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hvmgr.errors import HostFailed, OutcomeUnknown
from hvmgr.host import hypervisor
from hvmgr.host.hypervisor import State

pytestmark = pytest.mark.libvirtd


@pytest.fixture
def daemon_connection(libvirtd):
    with hypervisor.opened(libvirtd.uri, wait_s=0) as connection:
        yield connection


def test_a_domain_lives_through_save_and_switch(daemon_connection, make_xml, make_image, folder):
    base = make_image("base.qcow2")
    first, second = make_image("first.qcow2", backing=base), make_image("second.qcow2", backing=base)
    domain = daemon_connection.define(make_xml("guest", [("vda", "qcow2", base)]))
    domain.start()
    domain.switch_disks({"vda": first}, memory=folder / "memory.save")
    assert domain.writable_files() == {first}
    xml = domain.migratable_xml()
    domain.destroy()
    daemon_connection.restore(folder / "memory.save", xml.replace(str(first), str(second)), running=True)
    assert domain.state() is State.RUNNING
    assert domain.writable_files() == {second}


def test_network_that_is_not_there_or_not_up_is_lacking(daemon_connection):
    assert daemon_connection.lacks_network("nowhere")
    xml = "<network><name>inner</name><bridge name='hvinner0'/></network>"  # defined, and never started
    defined = daemon_connection._handle.networkDefineXML(xml)
    try:
        assert daemon_connection.lacks_network("inner")
    finally:
        defined.undefine()


def test_own_folders_are_the_usual_ones_inside(libvirtd, daemon_connection, make_xml):
    domain = daemon_connection.define(make_xml("guest"))
    domain.start()
    domain.managed_save()
    inside = daemon_connection.managed_save_path("guest")
    subprocess.run([*libvirtd.enter, "test", "-f", str(inside)], check=True, timeout=60)
    code = "from hvmgr.host import hypervisor as h; print(h.connect('qemu:///system', wait_s=0).domains()[0].state())"
    answer = subprocess.run(
        [*libvirtd.enter, sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert answer.stdout == "saved\n"


def test_guests_outlive_a_restart_of_the_daemon(libvirtd, make_xml):
    with hypervisor.opened(libvirtd.uri, wait_s=0) as connection:
        connection.define(make_xml("guest")).start()
    libvirtd.stop()
    libvirtd.start()
    with hypervisor.opened(libvirtd.uri, wait_s=0) as connection:
        assert connection.find_domain_by_name("guest").state() is State.RUNNING


def test_question_to_a_dead_daemon_fails(libvirtd, daemon_connection):
    libvirtd.stop(signal_=signal.SIGKILL)
    with pytest.raises(HostFailed):
        daemon_connection.domains()


def test_daemon_that_dies_during_a_change_leaves_the_outcome_unknown(libvirtd, daemon_connection, make_xml):
    domain = daemon_connection.define(make_xml("guest"))
    libvirtd.process.send_signal(signal.SIGSTOP)  # it gets the request and cannot answer
    killer = threading.Thread(target=lambda: (time.sleep(2), libvirtd.stop(signal_=signal.SIGKILL)))
    killer.start()
    with pytest.raises(OutcomeUnknown, match="start guest"):
        domain.start()
    killer.join()
