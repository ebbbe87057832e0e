"""Exclusive work on a VM: what is open, and what others did to it, is settled first; then plans are carried out.

Nothing is imported before it is needed: those who only read homes start in half the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvmgr.model.plan import Plan
    from hvmgr.operations.session import Session
    from hvmgr.operations.vm import VM


@contextlib.contextmanager
def on(
    vm: VM,
    *,
    needs_present: bool = True,
    patient: bool = True,
    bandwidth: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Session]:
    """The VM is locked for the block; without ``needs_present`` also while nobody can tell what others did to the present.

    Without ``patient`` it is Busy while libvirt or QEMU goes on with what a command asked for that died.
    """
    from hvmgr.operations import reconcile

    with vm.host.session(vm.home, stop=stop) as session:
        session.patient, session.bandwidth = patient, bandwidth or 0
        reconcile.bring_together(session, needs_present=needs_present)
        yield session


def carry_out(session: Session, plan: Plan, snapshots: Sequence[str] = ()) -> None:
    """Carries a plan out; ``snapshots`` are those that it is about, besides the one that it makes."""
    from hvmgr.operations import occasions
    from hvmgr.operations.steps import execution

    with occasions.operation(session, plan, snapshots=snapshots):
        execution.run(session, plan)
