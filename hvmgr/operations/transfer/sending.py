"""How a disk of a VM is opened for sending: under the home's lock everything is looked up and held, and then let go.

A VM that runs goes on in new images first; what was frozen for that is merged when the stream is closed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import tree
from hvmgr.model.image_format import ImageFormat
from hvmgr.operations import occasions, working
from hvmgr.operations.exchange import freezing
from hvmgr.operations.session import Session
from hvmgr.operations.transfer import outgoing
from hvmgr.operations.transfer.outgoing import Outgoing
from hvmgr.operations.transfer.points import Point
from hvmgr.storage import durable, frozen

if TYPE_CHECKING:
    from hvmgr.operations.vm import VM

ACTIVE = (State.RUNNING, State.PAUSED)
_MOST_WAITING = 16  # images on one chain that exports froze: the room up to libvirt's limit is the snapshots'


def of_vm(
    vm: VM,
    find: Callable[[], Point],
    find_base: Callable[[], Point] | None,
    fmt: ImageFormat,
    path: Path | None = None,
) -> Outgoing:
    """The stream of a point of a VM's disk; raises whatever speaks against it before a byte of it is made.

    ``path`` is where it goes, if that is a file, for the administrator's hooks.
    """
    with working.on(vm) as session:
        point, base = find(), None if find_base is None else find_base()
        outgoing.check(point, base, fmt)
        for one in (point, base):
            _require_whole(session, one)
        tell = occasions.require_leave(session, "disk export", _subject(point, base, fmt), path)
        try:
            if point.is_frozen or session.state() not in ACTIVE:
                made = outgoing.opened(point, base, fmt, report=session.progress)
            else:
                made = _of_running(vm, session, point, base, fmt)
        except BaseException as error:
            tell(error)
            raise
        made.tell = tell
        return made


def _of_running(vm: VM, session: Session, point: Point, base: Point | None, fmt: ImageFormat) -> Outgoing:
    _require_room(session, point)
    freezing.freeze(session, with_memory=False, quiesce=False)
    try:
        durable.remove_folder(session.layout.export)
        return outgoing.opened(point, base, fmt, report=session.progress, at_end=lambda: _end(vm))
    except BaseException:
        freezing.end(session, outcome="nothing was exported")
        raise


def _require_room(session: Session, point: Point) -> None:
    """Each export of a VM that runs makes its chain longer by an image until it has ended."""
    waiting = {parent for parent, _ in tree.pending(session.home.tree())}
    count = sum(str(path) in waiting for path, _ in point.chain)
    if count >= _MOST_WAITING:
        raise errors.Busy(
            f"{count} images of {point.name} that were frozen for exports wait to be merged",
            hint=f"let exports that go on end first; then: hvmgr snapshot merge {session.home.name}",
        )


def _end(vm: VM) -> None:
    try:
        with working.on(vm) as session:
            freezing.end(session)
    except errors.HvmgrError as error:  # the stream is complete all the same
        vm.host.reporter.notice(
            f"what was frozen for the export is not merged yet ({error}); later: hvmgr snapshot merge {vm.name}"
        )


def _require_whole(session: Session, point: Point | None) -> None:
    """Nobody wrote to what was frozen: the present's own image is the only one that may have changed."""
    if point is not None:
        for path, _ in point.chain[0 if point.is_frozen else 1 :]:
            frozen.require_unchanged(session.layout, path)


def _subject(point: Point, base: Point | None, fmt: ImageFormat) -> str:
    since = "" if base is None else f", as far as it differs from {base.name}"
    return f"export of {point.name} as {fmt.value}{since}"
