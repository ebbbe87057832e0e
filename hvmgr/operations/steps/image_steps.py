"""How the image steps of a plan are done and undone. Every one can see that it is done already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host import internal_snapshots, qemu_img
from hvmgr.host.storage_daemon import Node
from hvmgr.model import plan
from hvmgr.model.progress import Progress
from hvmgr.operations import strangers
from hvmgr.operations.session import Session
from hvmgr.storage import contents, durable, frozen, images, index

# Measured side by side on a busy machine: 21 s for each TiB of disk that a stream walks through, 9 s more for each GiB
# of data that is pulled instead.
_SPARSE = 400


def create(session: Session, step: plan.CreateImage) -> None:
    """The image is on disk, and this host's QEMU may write it."""
    path = Path(step.path)
    backing = None
    if step.parent is not None:
        assert step.parent_format is not None
        backing = (name_of_parent(session, path, step.parent), step.parent_format)
    session.daemon.create_qcow2(path, size=step.size, backing=backing)
    durable.set_owner(path, session.owner)
    durable.sync_file(path)
    durable.sync_folder(path.parent)


def name_of_parent(session: Session, child: Path, parent: str) -> str:
    """What a header says of its parent."""
    return session.layout.parent_name(child, parent)


def uncreate(session: Session, step: plan.CreateImage) -> None:
    """The image is not there."""
    domain = session.find_domain() if session.recovering else None
    if domain is not None and domain.is_active():
        with contextlib.suppress(errors.HostFailed):  # a later switch then says in libvirt's words what is in its way
            domain.close_unused(Path(step.path))
    durable.remove(Path(step.path))


def freeze(session: Session, step: plan.FreezeImage) -> None:
    """The image is read-only."""
    _freeze(session, Path(step.path))


def _freeze(session: Session, path: Path) -> None:
    frozen.freeze(session.layout, path, keep_readers=session.is_read_by_mode(path))


def unfreeze(session: Session, step: plan.FreezeImage) -> None:
    """The image is writable again."""
    _thaw(session, Path(step.path))


def thaw(session: Session, step: plan.ThawImage) -> None:
    """The image has its own mode again, unless another VM needs it as it is."""
    _thaw(session, Path(step.path))


def _thaw(session: Session, path: Path) -> None:
    if session.layout.owns(str(path)):
        frozen.thaw(session.layout, path)
        return
    with index.locked([path], wait_s=session.wait_s):
        if strangers.of(session, [str(path)]):
            frozen.forget(session.layout, path)
        else:
            frozen.thaw(session.layout, path)


def record(session: Session, step: plan.RecordFrozen) -> None:
    """A later change of these frozen images will be seen."""
    for path in step.paths:
        frozen.record(session.layout, Path(path))


def copy(session: Session, step: plan.CopyImage) -> None:
    """The copy is complete and on disk."""
    durable.copy_file(Path(step.source), Path(step.target), owner=session.owner)


def complete(session: Session, step: plan.CompleteImage) -> None:
    """The new image is on disk; QEMU's lock on the old one stays ours until the switch, so that nothing is missed."""
    path = Path(step.target)
    below = session.hold_whole(step.source)
    daemon = session.daemon
    daemon.create_qcow2(path, size=step.size, backing=(step.source, below.fmt))
    node = daemon.open(path, images.QCOW2, writable=True, backing=below)
    try:
        daemon.stream(node, base=None, backing_file=None)
    finally:
        daemon.close(node)
    durable.set_owner(path, session.owner)
    durable.sync_file(path)
    durable.sync_folder(path.parent)


def convert_base(session: Session, step: plan.ConvertBase) -> None:
    """The image is on disk, and QEMU reads the same from it as from the base, which is only read."""
    source, target = Path(step.source), Path(step.target)
    shared = session.is_held(step.source)  # the lock on it is ours: nobody writes it

    def report(taken: int) -> None:
        session.progress(Progress(min(taken, step.size), step.size, f"convert {source.name}"))

    qemu_img.flatten(source, step.format, target, target_fmt=images.QCOW2, force_share=shared, on_progress=report)
    is_same = qemu_img.same((source, step.format), (target, images.QCOW2), force_share=shared)
    if not is_same or images.read(target, images.QCOW2).size != step.size:
        raise errors.Corrupt(
            f"{source} reads otherwise than the image that was made of it",
            hint=f"check it: hvmgr image check '{source}'",
            path=step.source,
        )
    durable.set_mode(target, frozen.WORKING_MODE)
    durable.set_owner(target, session.owner)
    durable.sync_file(target)
    durable.sync_folder(target.parent)


def convert_internal(session: Session, step: plan.ConvertInternal) -> None:
    """The image is on disk, and QEMU reads the same from it as from the snapshot inside the other one."""
    source, target = Path(step.source), Path(step.target)
    backing = (name_of_parent(session, target, step.parent), step.parent_format)
    internal_snapshots.extract(source, step.snapshot_id, target, backing=backing)
    if not internal_snapshots.is_same(source, step.snapshot_id, target):
        raise errors.Corrupt(
            f"the snapshot '{step.name}' inside {source} reads otherwise than the image that was made of it",
            hint=f"check it: qemu-img check '{source}'",
            path=step.source,
        )
    durable.set_mode(target, frozen.WORKING_MODE)
    durable.set_owner(target, session.owner)
    durable.sync_file(target)
    durable.sync_folder(target.parent)


def drop_internal(session: Session, step: plan.DropInternal) -> None:
    """The snapshot inside the image is gone; one that a VM has opened meanwhile keeps it, and that is said."""
    path = Path(step.path)
    if step.name not in {one.name for one in images.internal_snapshots(path)}:
        return
    try:
        internal_snapshots.delete(path, step.name)
    except errors.Conflict as error:
        session.say(
            f"the snapshot '{step.name}' stays inside {path} ({error}); when the VM is off: "
            f"qemu-img snapshot -d '{step.name}' '{path}'"
        )
        return
    durable.sync_file(path)


def uncopy(
    _session: Session, step: plan.CopyImage | plan.CompleteImage | plan.ConvertBase | plan.ConvertInternal
) -> None:
    """The copy is not there."""
    durable.remove(Path(step.target))


def move(session: Session, step: plan.MoveImage) -> None:
    """The image has its new name; its header keeps naming the same parent."""
    source, target = Path(step.source), Path(step.target)
    if not source.exists():
        frozen.forget(session.layout, source)  # the last part of this step, when it was cut off before
        return
    header = images.read(source, images.QCOW2)
    if header.backing is not None and source.parent != target.parent:
        raise errors.Conflict(f"{source} still has a parent and cannot leave its folder")
    durable.rename(source, target)
    frozen.forget(session.layout, source)
    session.forget_uses()


def merge_up(session: Session, step: plan.MergeUp) -> None:
    """The child holds the parent's data and stands on what was below it."""
    child, parent = Path(step.child), Path(step.parent)
    if has_to_wait(session, child, parent):
        return
    if not _is_on(child, parent):
        settle(session, child)
        _stands_on(session, step)
        return
    known = _known(session, child, parent)
    try:
        with _without_strangers(session, child, parent), session.interrupts.let_through():
            _stream(session, step, child, parent)
    except (errors.NoSpace, errors.HostFailed, errors.Conflict, errors.Cancelled) as error:
        put_off(session, error, child, parent)
        return
    durable.sync_file(child)
    _stands_on(session, step)
    settle(session, child)
    _note_known(session, child, parent, known)


def _is_on(child: Path, parent: Path) -> bool:
    """Whether the parent is still there and the child's header names it, by whatever path."""
    if not parent.exists():
        return False  # merged before; the child may have been moved away since
    below = images.read(child, images.QCOW2).parent
    return below is not None and below.exists() and images.identity(below) == images.identity(parent)


def _stands_on(session: Session, step: plan.MergeUp) -> None:
    session.uses.moved(step.child, parent=step.parent, below=step.below)


def _stream(session: Session, step: plan.MergeUp, child: Path, parent: Path) -> None:
    _make_writable(session, child, parent)
    zeros = _unwritten(child, *step.hide) if step.hide is not None else []
    inherited = [(one.start, one.length) for one in qemu_img.map(child, images.QCOW2) if one.present and one.depth == 1]
    daemon, nodes = session.daemon, list[Node]()
    try:
        below = None
        if step.below is not None:
            assert step.below_format is not None
            below = daemon.open(Path(step.below), step.below_format, writable=False)
            nodes.append(below)
        nodes.append(daemon.open(parent, images.QCOW2, writable=True, backing=below, detached_backing=below is None))
        nodes.append(daemon.open(child, images.QCOW2, writable=True, backing=nodes[-1]))
        if zeros:
            daemon.write_zeroes(nodes[-1], zeros)
        name = None if step.below is None else name_of_parent(session, child, step.below)
        if name is not None and below is not None and below.fmt == images.QCOW2 and _is_sparse(nodes[-1], inherited):
            daemon.pull(nodes[-1], nodes[-2], base=below, backing_file=name, ranges=inherited)
        else:
            daemon.stream(nodes[-1], base=below, backing_file=name)
    finally:
        for node in reversed(nodes):
            daemon.close(node)


def _is_sparse(node: Node, ranges: list[tuple[int, int]]) -> bool:
    """Whether walking through the whole disk takes longer than passing the ranges through a socket."""
    return sum(length for _, length in ranges) * _SPARSE < node.size


def merge_down(session: Session, step: plan.MergeDown) -> None:
    """The parent holds the child's data and has the child's name."""
    child, parent = Path(step.child), Path(step.parent)
    if has_to_wait(session, child, parent):
        return
    if not _is_on(child, parent):
        settle(session, child)
        return
    below, known = images.read(parent, images.QCOW2).parent, _known(session, child, parent)
    try:
        _require_same_size(child, parent)
        with session.interrupts.let_through():
            _commit(session, child, parent, rename=True)
    except (errors.NoSpace, errors.HostFailed, errors.Conflict, errors.Cancelled) as error:
        put_off(session, error, child, parent)
        return
    if below is not None:
        session.uses.moved(step.parent, parent=str(below), below=None)
    session.uses.moved(step.child, parent=step.parent, below=None if below is None else str(below))
    settle(session, child)
    _note_known(session, child, parent, known)


def _known(session: Session, child: Path, parent: Path) -> str | None:
    """What the child is known to hold since an import, which a merge does not change."""
    folder = session.layout.contents
    known = contents.held(folder, child)
    if known is not None:
        return known
    known = contents.held(folder, parent)
    if known is None:
        return None
    has_own = any(one.present and one.depth == 0 for one in qemu_img.map(child, images.QCOW2))
    is_cut = images.read(child, images.QCOW2).size != images.read(parent, images.QCOW2).size
    return None if has_own or is_cut else known


def _note_known(session: Session, child: Path, parent: Path, known: str | None) -> None:
    contents.forget(session.layout.contents, parent)
    if known is not None:
        with contextlib.suppress(errors.NoSpace):  # then nobody knows
            contents.note(session.layout.contents, child, known)
        if session.is_active():  # somebody was quicker, and writes it
            contents.forget(session.layout.contents, child)


def commit_into(session: Session, child: Path, parent: Path) -> None:
    """The parent shows what the child shows, and both keep their names; raises what keeps it from that.

    A shorter parent grows, with zeros where what is below it would show.
    """
    if images.read(child, images.QCOW2).size < images.read(parent, images.QCOW2).size:
        raise errors.Conflict(f"{child.name} has been made shorter")
    _commit(session, child, parent, rename=False)


def _commit(session: Session, child: Path, parent: Path, *, rename: bool) -> None:
    _make_writable(session, child, parent)
    daemon, nodes = session.daemon, list[Node]()
    try:
        nodes.append(daemon.open(parent, images.QCOW2, writable=True))
        nodes.append(daemon.open(child, images.QCOW2, writable=True, backing=nodes[0]))
        if names := daemon.drop_bitmaps(nodes[0]):
            session.say(f"{parent}: the dirty bitmaps {', '.join(names)} of a backup tool are gone with the merge")
        daemon.commit(nodes[1], nodes[0])
        durable.sync_file(parent)
        if session.is_active():
            raise errors.Conflict("the VM was started in the meantime")
        if rename:
            frozen.forget(session.layout, parent)
            # From here on the merge is done; both locks are still ours.
            durable.rename(parent, child)
    finally:
        for node in reversed(nodes):
            daemon.close(node)


def _require_same_size(child: Path, parent: Path) -> None:
    """A merge that was cut off may meet a disk that has been resized since it was planned."""
    if images.read(child, images.QCOW2).size != images.read(parent, images.QCOW2).size:
        raise errors.Conflict(f"{child.name} has been resized")


def flatten(session: Session, step: plan.Flatten) -> None:
    """The image has no parent."""
    path = Path(step.path)
    if not path.exists() or images.read(path, images.QCOW2).backing is None:
        return  # done before, and perhaps moved away since
    _make_writable(session, path)
    node = session.daemon.open(path, images.QCOW2, writable=True)
    try:
        session.daemon.stream(node, base=None, backing_file=None)
    finally:
        session.daemon.close(node)
    durable.sync_file(path)
    session.forget_uses()


def remove(session: Session, step: plan.RemoveImage) -> None:
    """The image is in the trash, unless something needs it after all."""
    path = Path(step.path)
    if not path.exists():
        frozen.forget(session.layout, path)  # the last part of this step, when it was cut off before
        return
    if step.path in session.waiting or session.uses.is_used(step.path):
        return
    if session.layout.owns(step.path):
        _remove(session, path)
    else:
        _remove_outside(session, path)
    session.uses.removed(step.path)


def _remove(session: Session, path: Path) -> None:
    _make_writable(session, path)
    node = session.daemon.open(path, images.RAW, writable=True)  # QEMU's lock; a damaged header does not matter
    try:
        durable.rename(path, session.layout.trash / path.name)
    finally:
        session.daemon.close(node)
    frozen.forget(session.layout, path)


def _remove_outside(session: Session, path: Path) -> None:
    """The image goes at once: the trash may lie on another file system. Whoever came to need it in between keeps it."""
    try:
        with _without_strangers(session, path):
            _make_writable(session, path)
            node = session.daemon.open(path, images.RAW, writable=True)
            try:
                index.forget_mode(path)
                durable.remove(path)
            finally:
                session.daemon.close(node)
    except errors.Conflict as error:
        session.say(f"{path} was merged and is kept: {error}")
        _thaw(session, path)
    frozen.forget(session.layout, path)


@contextlib.contextmanager
def _without_strangers(session: Session, *paths: Path) -> Iterator[None]:
    """Of these images no other VM needs those outside the home, nor comes to need them; Conflict when one does."""
    outside = [path for path in paths if not session.layout.owns(str(path))]
    with index.locked(outside, wait_s=session.wait_s):
        for path, names in (strangers.of(session, map(str, outside)) if outside else {}).items():
            raise errors.Conflict(f"{path} is needed by {', '.join(names)}", path=path, users=list(names))
        yield


def _unwritten(child: Path, offset: int, length: int) -> list[tuple[int, int]]:
    """The parts of a range, as far as the image reaches today, in which it holds nothing itself: (offset, length)."""
    end = min(offset + length, images.read(child, images.QCOW2).size)
    ranges, start = list[tuple[int, int]](), offset
    for extent in qemu_img.map(child, images.QCOW2):
        if extent.depth != 0 or not extent.present or extent.start >= end or extent.start + extent.length <= start:
            continue
        if extent.start > start:
            ranges.append((start, extent.start - start))
        start = extent.start + extent.length
    if start < end:
        ranges.append((start, end - start))
    return ranges


def _make_writable(session: Session, *paths: Path) -> None:
    for path in paths:
        frozen.make_writable(session.layout, path)
        if session.recovering:
            qemu_img.check(path, images.QCOW2, repair_leaks=True)


def settle(session: Session, path: Path) -> None:
    """Mode and record are what the image's users need."""
    if not path.exists():
        return
    if session.layout.owns(str(path)):
        durable.set_owner(path, session.owner)
    if session.uses.is_frozen(str(path)):
        _freeze(session, path)
        _record_or_forget(session, path)
    elif not session.layout.owns(str(path)):
        frozen.thaw(session.layout, path)
    else:
        durable.set_mode(path, frozen.WORKING_MODE)
        frozen.forget(session.layout, path)


def _record_or_forget(session: Session, path: Path) -> None:
    """On a full disk no record is right as well: it means unknown, while an old one would mean damaged."""
    try:
        frozen.record(session.layout, path)
    except errors.NoSpace:
        frozen.forget(session.layout, path)


def has_to_wait(session: Session, child: Path, parent: Path, *, when_open: bool = True) -> bool:
    """Because of an earlier step, because the user wants to stop, or (``when_open``) because the VM has one of them open."""
    pair = {str(child), str(parent)}
    stopping = session.put_off is not None or session.interrupts.wanted
    waits = stopping or bool(pair & session.waiting) or (when_open and bool(pair & session.busy_images()))
    if waits:
        wait(session, child, parent)
    return waits


def put_off(session: Session, error: errors.HvmgrError, child: Path, parent: Path) -> None:
    """What cannot be merged now is left whole, and waits."""
    session.put_off = error
    for path in (child, parent):
        with contextlib.suppress(errors.HvmgrError):  # clusters that the broken job leaked cost space, nothing else
            qemu_img.check(path, images.QCOW2, repair_leaks=True)
    wait(session, child, parent)


def wait(session: Session, child: Path, parent: Path) -> None:
    """Neither is merged or removed by this command any more."""
    session.waiting.update((str(child), str(parent)))
    settle(session, child)
    settle(session, parent)
