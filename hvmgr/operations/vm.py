"""One VM and its snapshots, as the public API has them; ``host`` opens them.

Reading comes from the home and needs neither libvirt nor a lock; what a dead command left open is completed or undone
by the next call that touches the VM. Values are as of the call that gave them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, settings
from hvmgr.model import names, tree
from hvmgr.model.metadata import SnapshotType
from hvmgr.model.policy import Policy
from hvmgr.model.tree import Tree
from hvmgr.operations import working
from hvmgr.operations.snapshot import Snapshot
from hvmgr.storage import journal, locks, vm_home
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hvmgr.host.domain import State
    from hvmgr.model.export_options import ExportOptions
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.model.put_options import FilesWanted, PutOptions
    from hvmgr.operations.adopt.release import Release
    from hvmgr.operations.exchange.finding_exports import Found
    from hvmgr.operations.exchange.importing import CloneOptions
    from hvmgr.operations.host import Host
    from hvmgr.operations.inside.differing import Outcome
    from hvmgr.operations.inside.looking import Inside
    from hvmgr.operations.inside.putting import Put
    from hvmgr.operations.inside.unlocking import Key
    from hvmgr.operations.session import Session
    from hvmgr.operations.snapshots import Wish
    from hvmgr.operations.transfer.outgoing import Outgoing
    from hvmgr.operations.transfer.recurrence import FoundDisk
    from hvmgr.operations.usage import Usage
    from hvmgr.vhd.inlet import Readable

# What changes a VM is imported by the methods that do it: those who only read homes start in half the time.


@dataclass(frozen=True, slots=True)
class VM:
    """One VM, by its home."""

    host: Host
    home: VmHome

    @property
    def id(self) -> str:
        """The VM's id: libvirt's uuid."""
        return self.home.vm_id

    @property
    def name(self) -> str:
        """The VM's present name."""
        return self.home.name

    @property
    def path(self) -> Path:
        """The home's folder."""
        return self.home.path

    def state(self) -> State:
        """What the VM does, by libvirt."""
        from hvmgr.host.domain import State

        domain = self.host.connection.find_domain(self.id)
        return State.OFF if domain is None else domain.state()

    def now(self) -> tree.Leaf:
        """The present: the snapshot above it, and its working images by slot."""
        self._complete()
        return vm_home.to_leaf(self.home.present())

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first."""
        self._complete()
        return [Snapshot.of(self, entry) for entry in self.home.entries()]

    def snapshot(self, reference: str) -> Snapshot:
        """A snapshot by exact name, full id, or an id's first 8 digits or more; ambiguous names are a UsageError."""
        return names.find_snapshot(reference, self.snapshots(), where=f"in {self.name}")

    def tree(self) -> Tree:
        """Both graphs as the home's files tell them: snapshots, images, present, undo slot."""
        self._complete()
        return self.home.tree()

    def usage(self) -> Usage:
        """What takes how much space."""
        from hvmgr.operations import usage

        self._complete()
        return usage.measure(self.home)

    def can_undo(self) -> bool:
        """Whether the undo slot holds something."""
        return self.home.layout.undo.exists()

    # -- what changes the VM -------------------------------------------------------------------------------------

    def create_snapshot(
        self,
        name: str | None = None,
        *,
        notes: str = "",
        type: SnapshotType | None = None,
        fallback: bool = True,
        compress: bool | None = None,
    ) -> Snapshot:
        """A new snapshot of the present; running VMs keep running and the memory of a standard one is saved.

        Without a ``type`` it is what the VM's policy says; Conflict when that is that there are none.
        It is saved while the guest goes on; where that cannot be the guest stands still for it, or, without ``fallback``,
        Unsupported. With ``compress`` it is compressed with zstd; None leaves that to the configuration file. For a
        production one the guest's agent puts its file systems to rest instead; where it does not, a standard one is taken,
        or, production-only, Conflict.
        """
        from hvmgr.operations import background, policies, snapshots

        wanted = settings.compression() == "zstd" if compress is None else compress
        how = background.How(fallback=fallback, compress=wanted)
        with working.on(self) as session:
            kind = SnapshotType(type) if type is not None else policies.default_type(self.policy, self.name)
            return self._create(session, snapshots.Wish(name, notes, kind, how))

    def _create(self, session: Session, wish: Wish) -> Snapshot:
        from hvmgr.operations import quiescing

        try:
            made = self._take(session, wish)
        except errors.HostFailed as error:
            other = quiescing.instead(session, wish, error)
            if other is None:
                raise
            made = self._take(session, other)
        return Snapshot.of(self, self.home.entry(made))

    def _take(self, session: Session, wish: Wish) -> str:
        """The id of the snapshot that was taken."""
        from hvmgr.operations import background, snapshots

        plan = snapshots.plan_create(session, wish)
        try:
            working.carry_out(session, plan)
        except errors.Cancelled as error:
            if error.facts.get("complete") and background.is_in_background(plan):
                background.take_back(session, snapshots.snapshot_of(plan))
            raise
        return snapshots.snapshot_of(plan)

    def undo(self, *, discard_state: bool = False) -> None:
        """Present and undo slot change places."""
        from hvmgr.operations import replacement

        with working.on(self) as session:
            working.carry_out(
                session, replacement.plan_undo(session, replacement.Replacement(discard_state=discard_state))
            )

    def revert(self, *, without_state: bool = False, keep_undo: bool = True, discard_state: bool = False) -> Snapshot:
        """Back to the snapshot above the present."""
        parent = self.now().parent
        if parent is None:
            raise errors.NotFound(f"the present of {self.name} has no snapshot above it")
        snapshot = self.snapshot(parent)
        snapshot.apply(without_state=without_state, keep_undo=keep_undo, discard_state=discard_state)
        return snapshot

    def merge(self, images: Sequence[Path | str] = (), *, bandwidth: int | None = None) -> bool:
        """Images that wait to be merged are merged, by the VM itself where it runs; whether any were.

        ``images`` names differencing images that were made outside hvmgr: they are merged as well, and removed. While the
        VM runs it merges at most ``bandwidth`` bytes a second.
        """
        from hvmgr.operations import merge

        with working.on(self, bandwidth=bandwidth) as session:
            plan = merge.plan_merge(session, [Path(image) for image in images])
            if plan.finish:
                working.carry_out(session, plan)
            merge.merge_upwards(session, plan)
        return bool(plan.finish)

    @property
    def policy(self) -> Policy:
        """What its owner wants of its snapshots, and of the VM after a crash."""
        return self.home.facts().policy

    def set(
        self,
        *,
        snapshot_type: str | None = None,
        automatic_snapshots: bool | None = None,
        keep: str | None = None,
        schedule: str | None = None,
        recovery: str | None = None,
        owner: str | None = None,
        tags: Sequence[str] = (),
        untags: Sequence[str] = (),
    ) -> bool:
        """The policy, the owner and the tags are this, in the words of ``vm set``; what is None stays. Whether that is a change.

        An empty ``owner`` is nobody.
        """
        from hvmgr.operations import policies

        wishes = policies.Wishes(
            snapshot_type, automatic_snapshots, keep, schedule, recovery, owner, tuple(tags), tuple(untags)
        )
        wishes.check()
        wishes.applied(self.policy, self.home.facts().created, lambda _: "")  # says what is wrong before anything else
        with working.on(self) as session:
            plan = policies.plan_set(session, wishes, lambda reference: self.snapshot(reference).id)
            if plan is not None:
                working.carry_out(session, plan)
        return plan is not None

    def start(self) -> bool:
        """The VM runs; whether that is a change."""
        from hvmgr.operations import vms

        with working.on(self) as session:
            return vms.start(session)

    def stop(self, *, force: bool = False, timeout_s: float = 60.0) -> bool:
        """The VM is off; whether that is a change. ``force`` is like pulling the plug."""
        from hvmgr.operations import vms

        with working.on(self, needs_present=False) as session:
            return vms.stop(session, force=force, timeout_s=timeout_s)

    def rename(self, name: str) -> None:
        """The VM has another name; its home keeps its folder."""
        from hvmgr.operations import vms

        with working.on(self) as session:
            working.carry_out(session, vms.plan_rename(session, name))

    def find_export(self, dest: Path | str, options: ExportOptions | None = None) -> Found | None:
        """What ``export`` would meet below ``dest``: a complete export of this kind, or None."""
        from hvmgr.model.export_options import ExportOptions
        from hvmgr.operations.exchange import finding_exports

        with working.on(self) as session:
            return finding_exports.find(session, Path(dest), options or ExportOptions())

    def export(self, dest: Path | str, options: ExportOptions | None = None) -> Path:
        """The VM, or one snapshot of it, as a folder below ``dest`` that is complete in itself; that folder.

        The VM is only read, and may run. An interrupted export goes on when it is called again.
        """
        from hvmgr.model.export_options import ExportOptions
        from hvmgr.operations.exchange import export_

        with working.on(self) as session:
            return export_.export(session, Path(dest), options or ExportOptions())

    def export_archive(self, target: Path | str | int, options: ExportOptions | None = None) -> None:
        """The same as one file: a new one, or an open descriptor such as that of stdout; tar, compressed with zstd."""
        from hvmgr.model.export_options import ExportOptions
        from hvmgr.operations.exchange import archive

        to = archive.Target(descriptor=target) if isinstance(target, int) else archive.Target(file=Path(target))
        with working.on(self) as session:
            archive.export(session, to, options or ExportOptions())

    def delete(self, *, with_disks: bool = False) -> list[str]:
        """The VM is gone; the files that stay in its folder: one complete image per disk, and disks that it had left."""
        from hvmgr.operations import vms
        from hvmgr.operations.inside import indexing

        vm_id = self.id
        with working.on(self) as session:
            working.carry_out(session, vms.plan_delete(session, with_disks=with_disks))
        indexing.forget(vm_id)
        return sorted(str(file) for file in self.path.rglob("*") if file.is_file())

    def clone(self, name: str, options: CloneOptions | None = None) -> VM:
        """Another VM like this one, from its present or from a snapshot, with ids and addresses of its own."""
        from hvmgr.operations.exchange import importing

        return importing.clone(self, name, options or importing.CloneOptions())

    def move(self, folder: Path | str) -> VM:
        """The VM, off or saved, with another home: ``folder``, or in it under the old name when it is there already."""
        from hvmgr.operations.exchange import moving

        target = moving.target_of(Path(folder), self.path)
        with working.on(self) as session:
            working.carry_out(session, moving.plan_move(session, target))
        return VM(self.host, vm_home.open_home(target))

    def require_resizable(self, slot: str, size: int) -> None:
        """Raises what ``resize_disk`` would say of this size, before anybody is asked whether that is meant."""
        from hvmgr.operations import resizing

        with working.on(self) as session:
            resizing.plan_resize(session, slot, size, shrink=True)

    def resize_disk(self, slot: str, size: int, *, shrink: bool = False) -> bool:
        """The disk of the present has ``size`` bytes; whether that is a change. Snapshots keep their sizes.

        ``shrink`` allows it to get smaller, as far as no partition is cut off.
        """
        from hvmgr.operations import resizing

        with working.on(self) as session:
            plan = resizing.plan_resize(session, slot, size, shrink=shrink)
            if plan is not None:
                working.carry_out(session, plan)
        return plan is not None

    def export_disk(
        self,
        slot: str,
        *,
        snapshot: str | None = None,
        base: str | None = None,
        format: ImageFormat | None = None,
        path: Path | None = None,
    ) -> Outgoing:
        """The disk as a stream (VHD unless stated otherwise), to be sent and then closed; the VM may run.

        As it is at present, or as ``snapshot`` has it; with ``base``, another snapshot, only what differs from that one.
        Whatever can be refused is refused here. ``path`` is where it goes, if that is a file, for the administrator's hooks.
        """
        from hvmgr.model.image_format import ImageFormat
        from hvmgr.operations.transfer import points, sending

        older = None if base is None else points.named(self, slot, base)
        return sending.of_vm(self, points.named(self, slot, snapshot), older, format or ImageFormat.VHD, path)

    def find_disk_export(
        self,
        file: Path | str,
        slot: str,
        *,
        snapshot: str | None = None,
        base: str | None = None,
        format: ImageFormat | None = None,
        compare: bool = True,
    ) -> FoundDisk | None:
        """What stands where ``export_disk`` would be written to, or None; with ``compare`` whether it is just that, by its bytes."""
        from hvmgr.model.image_format import ImageFormat
        from hvmgr.operations.transfer import points, recurrence

        older = None if base is None else points.named(self, slot, base)
        point, kind = points.named(self, slot, snapshot), format or ImageFormat.VHD
        return recurrence.find(self, Path(file), point, older, kind, compare=compare)

    def look_inside(
        self,
        *,
        snapshot: str | None = None,
        slot: str | None = None,
        partition: str | None = None,
        keys: Mapping[str, bytes] | None = None,
        present: bool = False,
        libguestfs: bool = False,
    ) -> AbstractContextManager[Inside]:
        """The file systems on the disks, to be read inside the block; the VM may run, and is then seen at its latest snapshot.

        With ``present`` it is seen as it is now: it goes on in new images, which are merged after the block.

        ``partition`` is a number, or the name ``GROUP/VOLUME`` of a logical volume. ``keys`` open what is encrypted with
        LUKS, each for SLOT, SLOT:N, :N, GROUP/VOLUME, or for all of it (an empty word). With ``libguestfs`` that is the
        reader: it knows more file systems, and arrays, and takes seconds to start. Nothing is written.
        """
        from hvmgr.operations.inside import looking, standing, unlocking, views

        found = unlocking.given(keys)
        if present and snapshot is not None:
            raise errors.UsageError("a snapshot is not the present", hint="ask for one of them")
        if present:
            return standing.opened(self, slot=slot, partition=partition, keys=found, libguestfs=libguestfs)
        disks = views.of_vm(self, snapshot=snapshot, slot=slot)
        return looking.opened(disks, partition=partition, keys=found, libguestfs=libguestfs)

    def put_files(
        self,
        sources: Sequence[Path | str],
        destination: bytes,
        manner: PutOptions | None = None,
        *,
        slot: str | None = None,
        partition: str | None = None,
        owner: str | None = None,
        name: str | None = None,
        keys: Mapping[str, bytes] | Sequence[Key] = (),
    ) -> Put:
        """Files and folders of this host are in a file system of the VM, which is off; what was before is a snapshot.

        They go into the folder ``destination``, or a single one gets that path. ``owner`` is ``USER[:GROUP]`` as that system knows them, ``name`` the snapshot's,
        ``keys`` are as for ``look_inside``. On any failure nothing has changed.
        """
        from hvmgr.model.put_options import PutOptions
        from hvmgr.operations.inside import putting, unlocking
        from hvmgr.operations.inside import sources as inside_sources

        gathered = inside_sources.of_host([Path(one) for one in sources])
        with working.on(self) as session:
            putting.require_off(session, hint=f"stop it first: hvmgr vm stop {self.name}")
            how = manner or PutOptions()
            place = putting.Target(destination, slot, partition, unlocking.given(keys))
            return putting.put(session, self, gathered, place, how, owner=owner, name=name, operation="file put")

    def restore_files(
        self,
        wanted: FilesWanted,
        manner: PutOptions | None = None,
        *,
        name: str | None = None,
        keys: Mapping[str, bytes] | Sequence[Key] = (),
    ) -> Put:
        """Files of a snapshot are in the present of the VM again, which is off, with the owners, modes and times that they had.

        What was before is a snapshot, called ``name``; ``keys`` are as for ``look_inside``. On any failure nothing has changed.
        """
        from hvmgr.model.put_options import PutOptions
        from hvmgr.operations.inside import restoring, unlocking

        with working.on(self) as session:
            how, opens = manner or PutOptions(), unlocking.given(keys)
            return restoring.restore(session, self, wanted, how, name=name, keys=opens)

    def restore_into_guest(
        self, wanted: FilesWanted, *, overwrite: bool = False, keys: Mapping[str, bytes] | Sequence[Key] = ()
    ) -> Put:
        """Files of a snapshot are in the guest that runs, put there by its agent.

        Each is compared before it takes the place of what is there, where the agent may run programs; else it is written in
        place, which is told. After an error the files that came before it are there, and no part of another one unless told.
        ``keys`` open the snapshot; the guest has its own disks open.
        """
        from hvmgr.operations.inside import returning, unlocking

        with working.on(self, needs_present=False) as session:
            return returning.restore(session, self, wanted, unlocking.given(keys), overwrite=overwrite)

    def compare_files(
        self,
        old: str,
        new: str | None = None,
        *,
        slot: str | None = None,
        paths: Sequence[bytes] = (),
        keys: Mapping[str, bytes] | None = None,
        present: bool = False,
    ) -> Outcome:
        """Which files are not the same at a snapshot and at a later one, or at present (``new`` None); below ``paths`` only.

        ``keys`` and ``present`` are those of ``look_inside``: with ``present`` the VM, which may run, stands still for it.
        """
        from hvmgr.operations.inside import differing, standing, unlocking, views

        if present and new is not None:
            raise errors.UsageError("a snapshot is not the present", hint="ask for one of them")
        before = views.of_vm(self, snapshot=old, slot=slot)
        with contextlib.ExitStack() as stack:
            if present:
                after = stack.enter_context(standing.still(self, slot=slot))
            else:
                after = views.of_vm(self, snapshot=new, slot=slot)
            return differing.between(before, after, paths=paths, keys=unlocking.given(keys))

    def import_disk(
        self,
        slot: str,
        source: Readable,
        *,
        format: ImageFormat,
        length: int | None = None,
        force: bool = False,
        to_end: bool = True,
        name: str = "the stream",
    ) -> None:
        """The disk of the VM, which is off, holds what arrives from ``source``; on any failure it holds what it held.

        A full image replaces everything; a delta has to start from what the disk holds, unless ``force`` is given.
        ``length`` is that of the stream where it is known; ``to_end=False`` is for one that stays open behind its disk.
        """
        from hvmgr.operations.transfer import landing
        from hvmgr.operations.transfer.incoming import Incoming

        with working.on(self) as session:
            landing.require_ready(session, slot)
        spool = self.home.layout.private
        made = Incoming(source, format, spool=spool, length=length, to_end=to_end, name=name)
        with made as stream, working.on(self) as session:
            landing.receive(session, slot, stream, force=force)

    def require_importable(self, slot: str) -> None:
        """Raises what ``import_disk`` would say of the disk and the VM before anything arrives."""
        from hvmgr.operations.transfer import landing

        with working.on(self) as session:
            landing.require_ready(session, slot)

    def localize(self, slot: str) -> bool:
        """The disk, in every state, needs no image outside the home any more; whether that is a change."""
        from hvmgr.operations.exchange import localizing

        with working.on(self) as session:
            plan = localizing.plan_localize(session, slot)
            if plan is not None:
                working.carry_out(session, plan)
        return plan is not None

    def convert_disk(self, slot: str) -> bool:
        """No state of the disk stands on a VHD any more, so that memory can be saved; whether that is a change.

        The VHD stays as it is. A VM that runs goes on meanwhile.
        """
        from hvmgr.operations.exchange import converting

        with working.on(self) as session:
            if converting.has_to_go_on(session, slot):
                if session.dry_run:
                    session.say("what is shown is the first part; the new image then takes in all that is below it")
                working.carry_out(session, converting.plan_go_on(session, slot))
                session.forget_uses()
            plan = converting.plan_convert(session, slot)
            if plan is not None:
                working.carry_out(session, plan)
        return plan is not None

    def foresee_release(self, *, flatten: bool = False) -> Release:
        """What ``release`` would make of the VM; nothing is changed."""
        from hvmgr.operations.adopt import release

        self._complete()
        return release.foresee(self.home, flatten=flatten)

    def release(self, *, flatten: bool = False) -> Release:
        """The VM is a plain domain of libvirt's, and hvmgr knows nothing of it; its files stay where they are.

        A line of snapshots becomes libvirt's own; with ``flatten`` the present is one complete image per disk instead.
        """
        from hvmgr.operations.adopt import release

        with working.on(self) as session:
            made = release.of(session, flatten=flatten)
            working.carry_out(session, release.plan_release(session, flatten=flatten))
        return made

    def _complete(self) -> None:
        """A reader never waits; but what a dead command left open is not a state to show."""
        layout = self.home.layout
        if locks.is_held(layout.lock):
            return
        if journal.is_open(layout.journal):
            try:
                with working.on(self, needs_present=False, patient=False):
                    pass
            except errors.Busy as error:
                if not error.facts.get("goes_on"):
                    raise
        elif layout.guest_at_rest.exists():  # its agent is asked again, which hides nothing from a reader
            with contextlib.suppress(errors.HvmgrError), working.on(self, needs_present=False):
                pass
