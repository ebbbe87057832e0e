"""Whether the present is still exactly what a snapshot holds: then there is nothing to apply.

Only what is proved counts. A VM that runs, or whose memory is saved, has gone on; so has one with a byte written to a
working image, another configuration, other firmware variables or another TPM state.
"""

from __future__ import annotations

import filecmp
from pathlib import Path

from hvmgr.host import qemu_img
from hvmgr.host.domain import State
from hvmgr.model import configuration
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import SavedState
from hvmgr.operations import snapshots
from hvmgr.operations.session import Session
from hvmgr.storage import images, vm_home

_NOWHERE = Path("/")


def is_still(session: Session, snapshot_id: str, *, without_state: bool = False) -> bool:
    """Whether the VM is off, as the snapshot would leave it, and nothing of it was changed since it was there."""
    present, target = session.home.present(), session.home.snapshot(snapshot_id)
    record = snapshots.record_of(target)
    goes_on = record.state is not SavedState.NONE and not without_state
    return (
        not goes_on
        and not record.damaged
        and session.doubt is None
        and session.state() is State.OFF
        and vm_home.require_facts(present).parent == snapshot_id
        and _is_same_machine(present, target)
        and _is_same_firmware(session, present, target, snapshot_id, was_off=record.state is SavedState.NONE)
        and _are_untouched(session, snapshot_id)
    )


def _is_same_machine(present: Configuration, target: Configuration) -> bool:
    """The same configuration, but for what every apply makes anew: images, NVRAM file, ids."""
    plain = []
    for one in (present, target):
        copy = one.without_metadata().copy()
        copy.strip_backing_chains()
        copy.set_name(present.name)
        for slot in vm_home.disks_of(one):
            copy.set_disk_source(slot, _NOWHERE, images.QCOW2)
        if copy.nvram is not None:
            copy.set_nvram(_NOWHERE)
        if copy.genid is not None:
            copy.set_genid(present.uuid)
        plain.append(copy.to_xml())
    return configuration.same(*plain)


def _is_same_firmware(
    session: Session, present: Configuration, target: Configuration, snapshot_id: str, *, was_off: bool
) -> bool:
    if target.nvram is not None and present.nvram is not None and target.nvram.exists():
        if not (present.nvram.exists() and filecmp.cmp(present.nvram, target.nvram, shallow=False)):
            return False
    elif present.nvram is not None and present.nvram.exists():
        return False
    if not target.has_tpm:
        return True
    here, then = session.connection.tpm_folder(session.home.vm_id), session.layout.snapshot_tpm(snapshot_id)
    return was_off and _files(here) == _files(then)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def _are_untouched(session: Session, snapshot_id: str) -> bool:
    """Each working image is a child of the frozen one, of its size, and holds nothing of its own."""
    tree = session.home.tree()
    node = tree.nodes[snapshot_id]
    if set(node.disks) != set(tree.present.disks):
        return False
    for slot, path in tree.present.disks.items():
        frozen, image = node.disks[slot], tree.images.get(path)
        below = tree.images.get(frozen)
        if image is None or below is None or image.parent != frozen or image.size != below.size:
            return False
        if any(one.depth == 0 and one.present for one in qemu_img.map(Path(path), image.format)):
            return False
    return True
