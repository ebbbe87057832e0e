"""Whether the guest can put its own file systems to rest for a snapshot, and what a snapshot becomes where it cannot."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import guest_agent
from hvmgr.host.domain import State
from hvmgr.host.guest_agent import Obstacle
from hvmgr.model.metadata import SnapshotType
from hvmgr.storage import journal

if TYPE_CHECKING:
    from hvmgr.operations.session import Session
    from hvmgr.operations.snapshots import Wish

_INSTEAD = "a standard snapshot is taken instead of a production one"


def find_obstacle(session: Session, state: State) -> Obstacle | None:
    """What keeps the guest from putting its file systems to rest now; None when nothing does. Nothing is changed."""
    name = session.home.name
    if state is State.PAUSED:
        return Obstacle(f"{name} is paused: its agent cannot answer", "let it run on first")
    if state is not State.RUNNING:
        return Obstacle(f"{name} is {state}: its agent cannot answer", "start it first")
    return guest_agent.find_obstacle(session.domain())


def settle_type(session: Session, state: State, wanted: SnapshotType) -> SnapshotType:
    """What kind of snapshot is taken, as far as that is known before anything is done; a fall-back is said.

    A VM that is off writes nothing, and nobody needs to help. Conflict when a production snapshot and nothing else is wanted, and
    something is in the way.
    """
    if wanted not in (SnapshotType.PRODUCTION, SnapshotType.PRODUCTION_ONLY):
        return wanted
    obstacle = None if state is State.OFF else find_obstacle(session, state)
    if obstacle is None:
        return SnapshotType.PRODUCTION
    if wanted is SnapshotType.PRODUCTION_ONLY:
        raise errors.Conflict(
            f"no production snapshot can be taken: {obstacle.reason}",
            hint=f"{obstacle.remedy}, or take one with --type production, standard or disk-only",
        )
    session.say(f"{_INSTEAD}: {obstacle.reason}; {obstacle.remedy}")
    return SnapshotType.STANDARD


def instead(session: Session, wish: Wish, error: errors.HvmgrError) -> Wish | None:
    """What is wished for after a plan failed because the guest's agent did not help, said; None when it was not that.

    None too when the VM ended meanwhile, or the agent does not wake what it may have put to rest: memory that is saved
    now could hold a guest that nobody ever wakes.
    """
    if error.facts.get("quiesced") is not False or journal.is_open(session.layout.journal):
        return None
    is_awake = session.state() is State.RUNNING and not session.layout.guest_at_rest.exists()
    if wish.type is SnapshotType.PRODUCTION and is_awake:
        session.say(f"{_INSTEAD}: {error}")
        return dataclasses.replace(wish, type=SnapshotType.STANDARD)
    error.hint = error.hint or "look after the guest's agent, or take a snapshot with --type standard or disk-only"
    return None
