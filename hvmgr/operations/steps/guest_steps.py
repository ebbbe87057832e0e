"""How the steps that need the guest's help are done and undone: its agent puts its file systems to rest and wakes them."""

from __future__ import annotations

from hvmgr.host import guest_agent
from hvmgr.model import plan
from hvmgr.operations.session import Session


def quiesce(session: Session, _step: plan.QuiesceGuest) -> None:
    """The guest's file systems are at rest."""
    if guest_agent.freeze(session.domain()) == 0:
        session.say("the guest's agent found no file system that could be put to rest")


def wake(session: Session, _step: plan.QuiesceGuest | plan.WakeGuest) -> None:
    """The guest's file systems take writes; those of a guest that was stopped meanwhile wait for nobody."""
    domain = session.find_domain()
    if domain is not None and domain.is_active():
        guest_agent.thaw(domain)
