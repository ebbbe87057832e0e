"""``file put`` and ``file restore``: files go into a disk of a VM that is off, through a snapshot that is taken first.

It is one plan: that of the snapshot, with one step more. The new image of the disk, which nobody uses yet, is shown to a
program as a file; it writes, the file system is checked, everything is read back by our own readers; and only then the new
images become the present. Until then a failure or a death leaves what was, and afterwards the snapshot does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.host.image_export import Link
from hvmgr.model import plan
from hvmgr.model.progress import Progress
from hvmgr.model.put_options import PutOptions
from hvmgr.operations import occasions, snapshots
from hvmgr.operations.images.volumes import require_room
from hvmgr.operations.inside import arranging, asleep, exporting, looking, owners, views, writing
from hvmgr.operations.inside.arranging import Act, Arrangement
from hvmgr.operations.inside.browsing import Browser, shown
from hvmgr.operations.inside.kernel_writing import KernelWriter
from hvmgr.operations.inside.looking import Inside, Place
from hvmgr.operations.inside.sources import Gathered
from hvmgr.operations.inside.unlocking import Key
from hvmgr.operations.inside.views import Volume
from hvmgr.operations.inside.writing import Writer
from hvmgr.operations.steps import execution
from hvmgr.storage import images, runtime
from hvmgr.storage.filesystems import opening
from hvmgr.storage.filesystems.reader import Content, Node, Type

if TYPE_CHECKING:
    from hvmgr.operations.session import Session
    from hvmgr.operations.vm import VM

_PIECE = 4 << 20
_COARSE_NS = 2_000_000_000  # as FAT keeps times
_FORMAT = "let the guest, or 'hvmgr image prepare' on an image of its own, make a file system there first"


@dataclass(frozen=True, slots=True)
class Target:
    """Where things go: a path, on the only file system that has it, or on the disk and partition that are named.

    ``keys`` open what is encrypted on the way.
    """

    path: bytes
    slot: str | None = None
    partition: str | None = None
    keys: Sequence[Key] = ()


@dataclass(frozen=True, slots=True)
class Put:
    """What was put: ``files`` names, of which ``replaced`` were there before; ``snapshot`` is what was before, by its id.

    ``engine`` says what wrote it; ``left_out`` counts what was not put, by the reason. Without a snapshot nothing was to do.
    """

    folder: bytes
    volume: str
    engine: str
    files: int = 0
    replaced: int = 0
    size: int = 0
    snapshot: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def require_off(session: Session, *, hint: str) -> None:
    """Conflict unless the VM is off: nobody else may write its file systems."""
    state, name = session.state(), session.home.name
    if state is State.SAVED:
        raise errors.Conflict(
            f"the memory of {name} is saved, and fits its disks as they are",
            hint=f"start it, or drop the saved memory: virsh managedsave-remove {name}",
        )
    if state is not State.OFF:
        raise errors.Conflict(f"{name} is {state}, and writes its file systems itself", hint=hint)


def put(
    session: Session, vm: VM, gathered: Gathered, target: Target, manner: PutOptions, *, owner: str | None, name: str | None, operation: str
) -> Put:  # fmt: skip
    """The files are in the present of the VM, which is off; what was before is a snapshot. On any failure nothing changed."""
    if not gathered.items:
        raise errors.UsageError(f"nothing is left to put: {', '.join(gathered.left_out) or 'nothing was named'}")
    with looking.opened(views.of_vm(vm, slot=target.slot), partition=target.partition, keys=target.keys) as inside:
        browser = _choose(inside, target.path)
        writer = writing.find(browser.volume.kind, browser.volume.title)
        exporting.require()
        place = inside.place(browser.volume)
        _require_awake(vm, inside, target, browser.volume)
        if owner is not None:
            uid, gid = owners.resolve(browser, owner)
            manner = dataclasses.replace(manner, uid=uid, gid=gid)
        arranged = arranging.arrange(browser, target.path, gathered.items, manner)
        writer.require(arranged.acts, browser)
        arranged.acts = writing.within(arranged.acts, *writer.times(browser))
        _tell(session, browser, arranged, writer)
        done = Put(
            arranged.folder, browser.volume.title, writer.title, arranged.files, arranged.replaced, arranged.size,
            left_out=gathered.left_out,
        )  # fmt: skip
    if not arranged.acts:
        return done
    _require_room(session, place, arranged.acts, writer, is_inside=manner.as_before)
    one = _plan(session, place, arranged, browser.volume, name, operation)
    session.putting = _Putting(browser.volume, place, arranged.acts, writer)
    try:
        with occasions.operation(session, one):
            execution.run(session, one)
    finally:
        session.putting = None
    return dataclasses.replace(done, snapshot=snapshots.snapshot_of(one))


def _require_room(session: Session, place: Place, acts: Sequence[Act], writer: Writer, *, is_inside: bool) -> None:
    """NoSpace when the new image and what is copied on the way do not fit; only data counts, but a kernel fills holes."""

    def copied(sizes: Sequence[int]) -> int:
        if isinstance(writer, KernelWriter):  # all contents are at hand at once
            return sum(sizes)
        return min(sum(sizes), max([*sizes, writing.BYTES_AT_ONCE])) if is_inside else 0

    def written(sizes: Sequence[int]) -> int:
        return whole if isinstance(writer, KernelWriter) else sum(sizes)

    def both(sizes: Sequence[int]) -> int:
        return written(sizes) + copied(sizes)

    sizes = [one.item.size for one in acts]
    whole, images_ = sum(sizes), session.layout.images
    rooms = [(images_, both, "what is put, with the copies on the way,")]
    if place.lock is not None:
        memory = runtime.own_folder(in_clear=True)
        memory = next(one for one in (memory, *memory.parents) if one.exists())
        rooms = [
            (images_, written, "what is put"),
            (memory, copied, "what is copied on the way, which is encrypted else,"),
        ]
    for folder, needed, what in rooms:
        if shutil.disk_usage(folder).free < needed(sizes):
            data = [0 if one.item.source is None else one.item.source.data_size() for one in acts]
            require_room(folder, needed(data), what)


def _require_awake(vm: VM, inside: Inside, target: Target, volume: Volume) -> None:
    """What sleeps on another disk of the VM sleeps with this one in its memory as well."""
    if target.slot is None and not (target.partition and target.keys):  # nothing more would be seen
        asleep.require_awake(inside, volume.kind)
        return
    with looking.opened(views.of_vm(vm), keys=target.keys) as all_of_it:
        asleep.require_awake(all_of_it, volume.kind)


def _choose(inside: Inside, path: bytes) -> Browser:
    """The file system that has the path, or the folder that it would be in."""
    parts = [one for one in path.split(b"/") if one]
    try:
        for count in range(len(parts), 0, -1):
            with contextlib.suppress(errors.NotFound):
                return inside.choose(b"/" + b"/".join(parts[:count]))
        return inside.choose(b"/")
    except errors.Unsupported as error:
        if all(one.kind is None for one in inside.volumes):
            error.hint = _FORMAT
        raise


def _tell(session: Session, browser: Browser, arranged: Arrangement, writer: Writer) -> None:
    for note in browser.reader.notes:
        session.say(f"{browser.volume.title}: {note}")
    for path in arranged.linked:
        what = "is replaced as well" if writer.writes_in_place else "stays what it was"
        session.say(f"{shown(path)} has other names, under which it {what}")


def _plan(
    session: Session, place: Place, arranged: Arrangement, volume: Volume, name: str | None, operation: str
) -> plan.Plan:
    vm, moment = session.home.name, session.now()
    usual = f"{vm} before {operation} ({moment.astimezone():%Y-%m-%d %H.%M.%S})"
    usual = usual if len(usual) <= snapshots.NAME_LENGTH else snapshots.default_name(vm, moment)
    taken = snapshots.plan_create(session, snapshots.Wish(name=usual if name is None else name))
    top = str(place.disk.links[0].path)
    made = next(one for one in taken.prepare if isinstance(one, plan.CreateImage) and one.parent == top)
    step = plan.PutFiles(
        child=made.path,
        parent=top,
        volume=f"{shown(arranged.folder)} of {volume.title}",
        files=arranged.files,
        size=arranged.size,
        work=str(runtime.own_folder(in_clear=place.lock is not None) / uuid.uuid4().hex[:12]),
        in_memory=place.lock is not None,
    )
    at = 1 + max(number for number, one in enumerate(taken.prepare) if isinstance(one, plan.CreateImage))
    return dataclasses.replace(
        taken,
        operation=operation,
        subject=f"{operation} into {step.volume} of {vm}",
        prepare=(*taken.prepare[:at], step, *taken.prepare[at:]),
    )


@dataclass(slots=True)
class _Putting:
    """What only this process has: what is to be written, and how."""

    volume: Volume
    place: Place
    acts: Sequence[Act]
    writer: Writer

    def write(self, session: Session, step: plan.PutFiles, spool: Path) -> None:
        links = (Link(Path(step.child), images.QCOW2), *self.place.disk.links)
        done, what = 0, f"put {step.files} files"

        def report(count: int) -> None:
            nonlocal done
            done += count
            session.progress(Progress(done, step.size, what))

        report(0)
        with exporting.shown(links, Path(step.work), self.place) as file:
            self.writer.write(file, self.acts, spool, report)
        session.progress(Progress(step.size, step.size, what))
        self._require_written(links, spool)

    def _require_written(self, links: tuple[Link, ...], spool: Path) -> None:
        with views.opened(dataclasses.replace(self.place.disk, links=links)) as source:
            assert self.volume.kind is not None
            opened = opening.open_reader(self.volume.kind, self.place.of(source))
            assert opened is not None
            browser = Browser(self.volume, opened)
            for act in self.acts:
                if why := self._difference(browser, act, spool):
                    raise errors.HostFailed(
                        f"{shown(act.path)} reads back otherwise than it was put by {self.writer.title}: {why};"
                        " nothing was changed",
                        path=shown(act.path),
                    )

    def _difference(self, browser: Browser, act: Act, spool: Path) -> str | None:
        try:
            found = browser.find(act.path, follow=False)
        except errors.NotFound:
            return "it is not there"
        node, item = found.node, act.item
        if node.type is not item.type or (item.type is Type.LINK and node.target != item.target):
            return f"it is {node.type.value}"
        if (why := self._other_facts(browser, node, act)) or item.source is None:
            return why
        with item.source.opened(spool) as descriptor:
            is_same = _is_same(browser.content(found), descriptor)
        return None if is_same else "its content differs"

    def _other_facts(self, browser: Browser, node: Node, act: Act) -> str | None:
        if self.writer.keeps_owners and (node.uid, node.gid) != (act.uid, act.gid):
            return f"it belongs to {node.uid}:{node.gid}"
        if self.writer.keeps_owners and act.item.type is not Type.LINK and node.mode != act.mode:
            return f"its mode is {node.mode:o}"
        moment = act.modified if act.item.type is Type.FILE else None
        if moment is not None and abs((node.modified or 0) - moment) > _COARSE_NS:
            return "it has another time"
        wanted, found = self.writer.kept(act.extras), self.writer.kept(browser.reader.extras(node))
        names = wanted.keys() | found.keys() if act.anew else wanted.keys()
        differing = sorted(name for name in names if wanted.get(name) != found.get(name))
        return f"another {', '.join(differing)}" if differing else None


def _is_same(content: Content, descriptor: int) -> bool:
    if os.fstat(descriptor).st_size != content.size:
        return False
    at = 0
    for offset, piece in content.pieces():
        if not _is_zero(descriptor, at, offset) or os.pread(descriptor, len(piece), offset) != bytes(piece):
            return False
        at = offset + len(piece)
    return _is_zero(descriptor, at, content.size)


def _is_zero(descriptor: int, start: int, end: int) -> bool:
    for at in range(start, end, _PIECE):
        piece = os.pread(descriptor, min(_PIECE, end - at), at)
        if piece.count(0) != len(piece):
            return False
    return True
