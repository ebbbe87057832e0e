"""Saved states that cannot be loaded: what shows beforehand stops nobody, what only the load shows leaves the present as it was."""

from __future__ import annotations

import dataclasses
import os

import pytest
from lxml import etree

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.model import configuration, plan
from hvmgr.operations.steps import execution

pytestmark = pytest.mark.guest


def cut_stream(memory):
    """Nothing but QEMU itself finds that out."""
    os.truncate(memory, saved_state.read(memory).data_offset + 65536)


@pytest.mark.parametrize("state", ["off", "paused", "saved"])
def test_present_is_what_it_was_when_only_the_load_shows_it(machine, state):
    snapshot = machine.vm.create_snapshot("one")
    cut_stream(machine.layout.memory(snapshot.id))
    late = machine.run_for(5)
    {"off": machine.domain.destroy, "paused": machine.domain.suspend, "saved": machine.domain.managed_save}[state]()
    before = machine.vm.now()
    with pytest.raises(errors.HvmgrError) as failure:
        snapshot.apply()
    assert "--without-state" in failure.value.hint
    assert machine.state() == state
    assert machine.vm.now() == before
    machine.check()
    if state == "off":
        assert machine.held() >= late.disk
        return
    if state == "saved":
        machine.domain.start(paused=True)
    assert machine.first_tick().memory >= late.memory


def with_head(memory, change):
    """The save file with a changed XML and cookie before the same stream."""
    state = saved_state.read(memory)
    stream = memory.read_bytes()[state.data_offset :]
    xml, cookie = change(etree.fromstring(state.xml.encode()), state.cookie)
    text = etree.tostring(xml, encoding="unicode")
    head = saved_state.head(text, complete=True, was_running=state.was_running, cookie=cookie)
    memory.write_bytes(head + stream)


def other_machine(xml, cookie):
    xml.find("os/type").set("machine", "pc-q35-99.0")
    return xml, cookie


def other_emulator(xml, cookie):
    xml.find("devices/emulator").text = "/nowhere/qemu-system-x86_64"
    return xml, cookie


def other_arch(xml, cookie):
    xml.find("os/type").set("arch", "s390x-of-nobody")
    return xml, cookie


def other_bridge(xml, cookie):
    nic = "<interface type='bridge'><source bridge='nobr0'/><mac address='52:54:00:00:00:01'/></interface>"
    xml.find("devices").append(etree.fromstring(nic))
    return xml, cookie


def other_cpu(xml, cookie):
    cpu = "<cpu mode='custom' match='exact' check='full'><model>Nehalem</model><feature policy='require' name='avx512f'/></cpu>"
    return xml, f"<cookie>{cpu}</cookie>"


CHANGES = {
    "machine type pc-q35-99.0": other_machine,
    "there is no /nowhere/qemu-system-x86_64": other_emulator,
    "no emulator for s390x-of-nobody": other_arch,
    "no bridge or device 'nobr0'": other_bridge,
    "features that this host does not offer": other_cpu,
}


def test_what_shows_beforehand_stops_nobody(machine, monkeypatch):
    snapshot = machine.vm.create_snapshot("one")
    memory = machine.layout.memory(snapshot.id)
    whole = memory.read_bytes()
    ran = machine.vm.snapshot("one").entry.record.qemu
    assert ran == machine.domain.qemu_version()
    acted = []
    monkeypatch.setitem(execution.DO, plan.SavePresent, lambda *_: acted.append("stopped"))

    def refuse(error, words):
        with pytest.raises(error, match=words) as failure:
            snapshot.apply()
        assert "--without-state" in failure.value.hint
        assert (machine.state(), acted) == ("running", [])

    for words, change in CHANGES.items():
        with_head(memory, change)
        refuse(errors.Unsupported, words)
        memory.write_bytes(whole)
    memory.write_bytes(whole[: saved_state.read(memory).data_offset] + bytes(len(whole)))
    refuse(errors.Corrupt, "no memory is in it")
    memory.write_bytes(whole)

    file = machine.layout.snapshot(snapshot.id)
    text = file.read_text()
    for version, is_older in (("99.1.0", True), (ran, False)):
        one = configuration.parse(text, source="the test")
        facts = one.metadata()
        one.set_metadata(dataclasses.replace(facts, snapshot=dataclasses.replace(facts.snapshot, qemu=version)))
        file.write_text(one.to_xml())
        if is_older:
            refuse(errors.Unsupported, "QEMU 99.1.0 saved it, and here is .*, which is older")
    monkeypatch.undo()
    snapshot.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()
