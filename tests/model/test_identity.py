"""Identities: one old id becomes one new id, wherever it is named."""

from __future__ import annotations

import itertools
import uuid
from datetime import UTC, datetime
from pathlib import Path

from hvmgr.model import configuration, identity
from hvmgr.model.metadata import DiskRecord, Metadata, SnapshotRecord

XML = """<domain type='kvm'>
  <name>web</name>
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <genid>99999999-2222-3333-4444-555555555555</genid>
  <sysinfo type='smbios'><system><entry name='uuid'>11111111-2222-3333-4444-555555555555</entry></system></sysinfo>
  <devices>
    <disk type='file' device='disk'><source file='/a'/><target dev='vda'/><serial>S1</serial></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='lan'/></interface>
    <interface type='network'><mac address='00:16:3E:00:00:02'/><source network='lan'/></interface>
  </devices>
</domain>
"""
THEN = datetime(2026, 11, 21, tzinfo=UTC)


def make(*, parent=None, snapshot=None):
    one = configuration.parse(XML, source="web.xml")
    one.set_metadata(
        Metadata(home=Path("/old/web"), uri="qemu:///system", created=THEN, parent=parent,
                 disks=(DiskRecord("vda", "d1"),), snapshot=snapshot)
    )  # fmt: skip
    return one


def renewed(present, *others, **more):
    tails = (number.to_bytes(3, "big") for number in itertools.count(1))
    wishes = {"name": None, "vm_id": "new", "new_id": lambda: str(uuid.uuid4()), "new_tail": lambda: next(tails)}
    return identity.renewed(present, [present, *others], **wishes | more)


def test_one_id_is_one_id_everywhere():
    root = make(snapshot=SnapshotRecord(id="s1", name="one", created=THEN))
    child = make(parent="s1", snapshot=SnapshotRecord(id="s2", name="two", created=THEN, parent="s1"))
    present = make(parent="s2")
    who = renewed(present, root, child)
    facts = [who.facts(one.metadata(), home=Path("/new"), uri="x") for one in (root, child, present)]
    assert facts[0].snapshot.id == facts[1].snapshot.parent == facts[1].parent
    assert facts[1].snapshot.id == facts[2].parent
    assert len({one.disks[0].id for one in facts}) == 1
    assert facts[0].disks[0].id != "d1"
    assert {facts[0].snapshot.id, facts[1].snapshot.id}.isdisjoint({"s1", "s2"})


def test_addresses_are_new_ones_of_the_same_maker():
    present = make()
    who = renewed(present, make(), taken=["52:54:00:00:00:02"])
    assert who.macs == {"52:54:00:00:00:01": "52:54:00:00:00:03", "00:16:3e:00:00:02": "00:16:3e:00:00:04"}


def test_kept_addresses_are_kept():
    assert renewed(make(), keep_macs=True).macs == {}


def test_impress_changes_the_uuid_wherever_the_guest_sees_it_and_keeps_serials():
    changed = make()
    renewed(changed, name="other", vm_id="66666666-2222-3333-4444-555555555555").impress(changed)
    text = changed.to_xml()
    assert "11111111-2222" not in text
    assert "99999999-2222" not in text
    assert "<serial>S1</serial>" in text
    assert changed.name == "other"


def test_kept_identity_changes_the_generation_id_alone():
    changed = make()
    identity.kept(changed, name=None, genid="77777777-2222-3333-4444-555555555555").impress(changed)
    assert changed.genid == "77777777-2222-3333-4444-555555555555"
    assert (changed.name, changed.uuid) == ("web", "11111111-2222-3333-4444-555555555555")
    assert [nic.mac for nic in changed.nics()] == ["52:54:00:00:00:01", "00:16:3e:00:00:02"]
