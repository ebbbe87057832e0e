"""``import --keep-id --replace``: what was exported takes the place of the VM with its id, as often as wanted.

The VM keeps its home, its name and its snapshots; snapshots that only the export has come back into the tree. The
present goes into the undo slot, as an apply does it: disks and configuration. Memory that was exported with the present
comes back as libvirt's managed save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model import plan, tree
from hvmgr.model.configuration import Configuration
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Image, Keeper, Leaf, Node, Tree
from hvmgr.operations import chains, occasions, reconcile, replacement, snapshots, undo_slot
from hvmgr.operations.exchange import import_, intake
from hvmgr.operations.exchange.intake import Intake
from hvmgr.operations.session import Session
from hvmgr.operations.steps import execution
from hvmgr.operations.vm import VM
from hvmgr.storage import frozen, vm_home

if TYPE_CHECKING:
    from hvmgr.operations.exchange.compare import Comparison
    from hvmgr.operations.host import Host


def run(host: Host, comparison: Comparison) -> VM:
    """The VM in its old place; when it raises, nothing has changed."""
    vm_id = comparison.source.vm_id
    vm = next((one for one in host.vms() if one.id == vm_id), None)
    if vm is None:
        raise errors.NotFound(
            f"there is no VM with the id {vm_id} to replace", hint="import it with --keep-id alone", id=vm_id
        )
    with host.session(vm.home) as session:
        reconcile.bring_together(session)
        one = plan_replace(session, comparison)
        with occasions.operation(session, one, path=comparison.source.origin):
            execution.run(session, one)
    return vm


def plan_replace(session: Session, comparison: Comparison) -> Plan:
    """The present becomes the export's, and the export's snapshots join the tree."""
    home, layout = session.home, session.layout
    present = home.present()
    facts = vm_home.require_facts(present)
    before = snapshots.whole_tree(session)
    taken = _take_in(session, comparison, before)
    how = replacement.Replacement()
    after = _with_import(taken, before)
    away = [] if before.undo is None else list(before.undo.disks.values())
    removed = tree.remove_userless(after, away)
    change = session.new_id()
    nvram = layout.nvram(session.new_id()) if taken.source.present.nvram is not None else None
    disks = taken.placed(taken.source.disks)
    defined = taken.present(change=change, nvram=nvram, disks=disks)
    _apart(taken, defined, before)
    prepare: list[Step] = [*taken.steps_for_images(hold=()), *taken.steps_for_snapshots()]
    if taken.present_memory is not None:  # of an archive it is unpacked by now
        taken = dataclasses.replace(taken, source=dataclasses.replace(taken.source, memory=taken.present_memory))
    if taken.source.nvram is not None and nvram is not None:
        prepare.append(taken.step_for_nvram(taken.source.nvram, nvram))
    prepare += replacement.put_present_away(session, present, facts, how)
    prepare += _memory(taken, disks, nvram)  # only now does libvirt's own place for it belong to nobody
    brought, finish = _tpm(session, taken) if taken.source.present.has_tpm else ([], [])
    prepare += brought
    return Plan(
        plan_id=change,
        vm_id=home.vm_id,
        operation="import",
        subject=f"return of {present.name} to what was exported to {taken.source.origin}",
        prepare=tuple(prepare),
        switch=plan.Define(xml=defined.to_xml()),
        finish=(
            *finish,
            *undo_slot.filled_by(session, present, keep=True),
            plan.WritePresent(),
            *removed.finish,
            plan.RecordFrozen(paths=taken.frozen()),
            plan.RemoveFile(path=str(layout.put_away)),
            plan.RemoveFile(path=str(layout.taken_in)),
            plan.RemoveFile(path=str(_unpacked_memory(session))),
            *taken.steps_after(),
        ),
        hold=snapshots.working(before),
    )


def _memory(taken: Intake, disks: Mapping[str, tuple[str, str]], nvram: Path | None) -> list[Step]:
    """A present that was exported with its memory goes on from it at the next start."""
    source = taken.source
    if source.memory is None or source.saved is None or taken.options.without_state:
        return []
    xml = taken.saved(source.saved, source.present, disks, nvram)
    return [plan.PutManagedSave(source=str(source.memory), kept=str(taken.layout.taken_in), xml=xml)]


def _take_in(session: Session, comparison: Comparison, before: Tree) -> Intake:
    """The export with the VM's own name, and without the snapshots that the VM has already."""
    source = comparison.source
    who = dataclasses.replace(comparison.identity, name=session.home.present().name)
    fresh = tuple(one for one in comparison.snapshots if one.record.id not in before.nodes)
    taken = import_.take_in(session, source, comparison.options, who, comparison.maps, comparison.used)
    own = _own_images(session, comparison, before)
    shared = {path: before.images[place].format for path, place in own.items()}
    places = intake.place_images(
        session.layout, source, fresh, {}, session.new_id, shared=shared, converted=taken.converted
    )
    has_memory = source.archive is not None and source.memory is not None and not comparison.options.without_state
    return dataclasses.replace(
        taken,
        snapshots=fresh,
        places={**places, **own},
        known=frozenset(before.nodes),
        shared=shared,
        present_memory=_unpacked_memory(session) if has_memory else None,
    )


def _unpacked_memory(session: Session) -> Path:
    """The saved memory of the present as an archive holds it."""
    return session.layout.private / "unpacked.save"


def _own_images(session: Session, comparison: Comparison, before: Tree) -> dict[str, str]:
    """The images of the export that need not be copied, each with the one of the home that shows the same.

    What a snapshot shows never changes: where the VM still has it, what is exported above it stands on its image here,
    however the chains below have been merged since.
    """
    own: dict[str, str] = {}
    for one in comparison.snapshots:
        node = before.nodes.get(one.record.id)
        if node is None:
            continue
        damaged = snapshots.record_of(session.home.snapshot(one.record.id)).damaged
        for slot, path in one.disks.items():
            if slot in damaged:
                continue
            place, image = node.disks.get(slot), comparison.source.images.get(path)
            here = None if place is None else before.images.get(place)
            if here is None or image is None or here.size != image.size or path in comparison.source.disks.values():
                continue
            for below in before.chain(here.path):
                frozen.require_unchanged(session.layout, Path(below.path))
            own[path] = here.path
    return own


def _apart(taken: Intake, defined: Configuration, before: Tree) -> None:
    """Disks whose images could not be put on the snapshot above them stand on copies of their own."""
    facts = vm_home.require_facts(defined)
    node = before.nodes.get(facts.parent or "")
    if node is None:
        return
    source = taken.source
    chains_of = {slot: {taken.places.get(one.path) for one in source.chain(top)} for slot, top in source.disks.items()}
    apart = [slot for slot, places in chains_of.items() if slot in node.disks and node.disks[slot] not in places]
    defined.set_metadata(dataclasses.replace(facts, disks=chains.set_apart(facts.disks, apart)))


def _with_import(taken: Intake, before: Tree) -> Tree:
    """The tree that is true afterwards."""
    images = dict(before.images)
    for one in taken.needed():
        place = taken.places[one.path]
        parent = None if one.parent is None else taken.places[one.parent]
        keeper = Keeper.BASES if one.parent is None else Keeper.IMAGES
        images[place] = Image(place, parent, taken.format_of(one.path), one.size, one.data, keeper)
    nodes = dict(before.nodes)
    for each in taken.snapshots:
        disks = {slot: taken.places[path] for slot, path in each.disks.items()}
        nodes[each.record.id] = Node(each.record.id, taken.heir(each.record.parent), disks)
    parent = None if taken.source.facts is None else taken.heir(taken.source.facts.parent)
    present = Leaf(parent, {slot: taken.places[path] for slot, path in taken.source.disks.items()})
    return dataclasses.replace(before, images=images, nodes=nodes, present=present, undo=before.present)


def _tpm(session: Session, taken: Intake) -> tuple[list[Step], list[Step]]:
    """What is done before the switch and after it: by then the source may be away, and the state is taken from the home."""
    folder = session.connection.tpm_folder(session.home.vm_id)
    if taken.source.tpm is None:
        return [], [plan.RemoveFolder(path=str(folder))]
    here = str(session.layout.private / "tpm")
    return (
        [plan.CopyFolder(source=str(taken.source.tpm), target=here)],
        [plan.ReplaceFolder(source=here, target=str(folder)), plan.RemoveFolder(path=here)],
    )
