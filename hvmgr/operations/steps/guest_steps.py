"""How the steps that need the guest's help are done and undone: its agent puts its file systems to rest and wakes them."""

from __future__ import annotations

from hvmgr import errors
from hvmgr.host import guest_agent
from hvmgr.model import plan
from hvmgr.operations import resting_guest
from hvmgr.operations.session import Session


def quiesce(session: Session, _step: plan.QuiesceGuest) -> None:
    """The guest's file systems are at rest. The error of an agent that did not do it has the fact ``quiesced``: False."""
    try:
        count = guest_agent.freeze(session.domain())
    except errors.HostFailed as error:
        error.facts["quiesced"] = False
        raise
    if count == 0:
        session.say("the guest's agent found no file system that could be put to rest")


def wake(session: Session, _step: plan.QuiesceGuest | plan.WakeGuest) -> None:
    """The guest's file systems take writes, or it is noted and said that its agent stays silent."""
    resting_guest.wake(session)
