"""Who a VM is after an import: its name, its ids, and the addresses of its cards, the same everywhere.

Pure: new ids and random bytes are made by functions that are handed in. An identity says what becomes of every id that
the present, the snapshots and the saved states name; what the guest knows its disks by (serial numbers) stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import Metadata
from hvmgr.model.policy import Policy, Recovery

VENDOR = 9  # characters of an address that name the maker: 'aa:bb:cc:'


@dataclass(frozen=True, slots=True)
class Identity:
    """What each old id and address becomes; what is not in a mapping stays."""

    vm_id: str
    name: str
    genid: str | None
    macs: Mapping[str, str] = field(default_factory=dict)
    snapshots: Mapping[str, str] = field(default_factory=dict)
    disks: Mapping[str, str] = field(default_factory=dict)

    def snapshot(self, snapshot_id: str | None) -> str | None:
        """The id of a snapshot, or of the parent of one."""
        return None if snapshot_id is None else self.snapshots.get(snapshot_id, snapshot_id)

    def impress(self, target: Configuration) -> None:
        """The configuration is this VM's."""
        target.set_name(self.name)
        target.set_uuid(self.vm_id)
        if self.genid is not None:
            target.set_genid(self.genid)
        for nic in target.nics():
            if nic.mac in self.macs:
                target.set_mac(nic.mac, self.macs[nic.mac])

    def facts(self, old: Metadata, *, home: Path, uri: str) -> Metadata:
        """hvmgr's own facts in the words of this identity; who the parents are is the same."""
        snapshot = old.snapshot
        if snapshot is not None:
            snapshot = dataclasses.replace(
                snapshot, id=self.snapshots.get(snapshot.id, snapshot.id), parent=self.snapshot(snapshot.parent)
            )
        return dataclasses.replace(
            old,
            home=home,
            uri=uri,
            parent=self.snapshot(old.parent),
            disks=tuple(dataclasses.replace(disk, id=self.disks.get(disk.id, disk.id)) for disk in old.disks),
            snapshot=snapshot,
            policy=self._policy(old.policy),
        )

    def _policy(self, old: Policy) -> Policy:
        """The snapshot that the VM goes back to after a crash is the same one, by its new id."""
        if old.recovery is None:
            return old
        return dataclasses.replace(old, recovery=Recovery(self.snapshot(old.recovery.snapshot)))


def kept(present: Configuration, *, name: str | None, genid: str | None) -> Identity:
    """The VM stays who it is; a new generation id tells the guest that it may have been put back in time."""
    return Identity(vm_id=present.uuid, name=name or present.name, genid=genid)


def renewed(
    present: Configuration,
    all_of_it: Iterable[Configuration],
    *,
    name: str | None,
    vm_id: str,
    new_id: Callable[[], str],
    new_tail: Callable[[], bytes],
    taken: Iterable[str] = (),
    keep_macs: bool = False,
) -> Identity:
    """Another VM: every id is new, and every address is a new one of the same maker that is not ``taken``.

    ``all_of_it`` are the present, the snapshots and the saved states: one address is one address in all of them.
    """
    macs: dict[str, str] = {}
    snapshots: dict[str, str] = {}
    disks: dict[str, str] = {}
    used = {one.lower() for one in taken}
    for one in all_of_it:
        for nic in one.nics():
            if nic.mac and not keep_macs and nic.mac not in macs:
                macs[nic.mac] = new_mac(nic.mac, new_tail, used)
                used.add(macs[nic.mac])
        facts = one.metadata()
        if facts is None:
            continue
        for disk in facts.disks:
            if disk.id not in disks:
                disks[disk.id] = new_id()
        for snapshot_id in (
            facts.parent,
            facts.snapshot and facts.snapshot.id,
            facts.snapshot and facts.snapshot.parent,
        ):
            if snapshot_id and snapshot_id not in snapshots:
                snapshots[snapshot_id] = new_id()
    return Identity(vm_id=vm_id, name=name or present.name, genid=new_id(), macs=macs, snapshots=snapshots, disks=disks)


def new_mac(old: str, new_tail: Callable[[], bytes], taken: Iterable[str]) -> str:
    """Another address of the same maker."""
    known = {old.lower(), *taken}
    while True:
        mac = old[:VENDOR].lower() + ":".join(f"{byte:02x}" for byte in new_tail()[:3])
        if mac not in known:
            return mac
