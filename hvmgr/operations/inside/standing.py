"""The present of a VM that runs, as it stands still: the VM goes on in new images, and what it wrote until then is read.

It is what a power cut would have left. Afterwards the VM itself merges what was frozen. A command that dies leaves unnamed
images, which are merged later: nothing that the guest or a snapshot shows depends on when.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.operations import occasions, working
from hvmgr.operations.exchange import freezing
from hvmgr.operations.inside import looking, views
from hvmgr.operations.inside.looking import Inside
from hvmgr.operations.inside.unlocking import Key
from hvmgr.operations.inside.views import Frozen
from hvmgr.operations.transfer import points
from hvmgr.storage import durable, transfers

if TYPE_CHECKING:
    from hvmgr.operations.session import Session
    from hvmgr.operations.vm import VM

_ACTIVE = {State.RUNNING: "runs", State.PAUSED: "is paused"}
_DONE = "what was asked for is complete"


@contextlib.contextmanager
def still(vm: VM, *, slot: str | None = None) -> Iterator[list[Frozen]]:
    """The disks of a VM at this moment, or ``slot`` alone, as long as the block lasts; the VM may run, and is not stopped."""
    with contextlib.ExitStack() as stack:
        with working.on(vm) as session:
            forest = session.home.present_tree()
            slots = [slot] if slot is not None else sorted(forest.present.disks)
            found = [points.of_slot(session.home, one, forest) for one in slots]
            moment, state = None, session.state()
            if state in _ACTIVE:
                stack.enter_context(_frozen(vm, session))
                durable.remove_folder(session.layout.export)
                moment = f"{vm.name} {_ACTIVE[state]}: this is what a power cut would have left of it just now"
            paths = dict.fromkeys(path for point in found for path, _ in point.chain)
            stack.callback(transfers.end, transfers.begin(f"the present of {vm.name}", paths))
        yield [views.of_point(one, moment) for one in found]


@contextlib.contextmanager
def opened(
    vm: VM, *, slot: str | None = None, partition: str | None = None, keys: Sequence[Key] = (), libguestfs: bool = False
) -> Iterator[Inside]:
    """The same with what lies on the disks, as ``looking.opened`` gives it."""
    with (
        still(vm, slot=slot) as disks,
        looking.opened(disks, partition=partition, keys=keys, libguestfs=libguestfs) as inside,
    ):
        yield inside


@contextlib.contextmanager
def _frozen(vm: VM, session: Session) -> Iterator[None]:
    """The VM goes on in new images until the block ends, if everybody lets it; how that ends is told."""
    if session.dry_run:
        raise errors.Conflict(
            f"to read the present of {vm.name}, which runs or is paused, changes it: its images are frozen and merged again",
            hint="leave out --dry-run; or leave out --present, and its latest snapshot is read",
        )
    tell = occasions.require_leave(session, "file", f"reading of the present of {vm.name}", None)
    try:
        freezing.freeze(session, with_memory=False, quiesce=False, outcome="nothing was read")
    except BaseException as error:
        tell(error)
        raise
    try:
        yield
    finally:
        _merge(vm)
        tell(None)


def _merge(vm: VM) -> None:
    try:
        with working.on(vm) as session:
            freezing.end(session, outcome=_DONE)
    except errors.HvmgrError as error:  # what was read is read
        vm.host.reporter.notice(
            f"what was frozen for this is not merged yet ({error}); later: hvmgr snapshot merge {vm.name}"
        )
