"""A guest whose file systems may still be at rest: its agent was asked to wake them and stayed silent.

Its programs stand still at their next write, and nobody but its agent can end that. So every command on the VM asks
again, once, since that agent is known to hang, says so, and goes on. ``.hvmgr/guest-at-rest`` is the note of its QEMU.

The same note, with a word in it, is written before a guest is put to rest without a journal (``standstill``): whatever
becomes of the command, the next one wakes the guest, and is patient, for this agent has not been silent yet.
"""

from __future__ import annotations

from hvmgr import errors
from hvmgr.host import guest_agent
from hvmgr.operations import running_qemu
from hvmgr.operations.session import Session
from hvmgr.storage import durable

_MEANT = "meant"


def announce(session: Session) -> None:
    """The home knows that the guest is about to be at rest: should nobody wake it, the next command does."""
    running_qemu.note(session, session.layout.guest_at_rest, _MEANT)


def wake(session: Session) -> bool:
    """The guest's file systems take writes, or the session and the home know that its agent stayed silent; which.

    Those of a guest that was stopped meanwhile wait for nobody.
    """
    domain = session.find_domain()
    if domain is not None and domain.is_active():
        try:
            guest_agent.thaw(domain, once=_was_silent(session))
        except errors.HostFailed as error:
            running_qemu.note(session, session.layout.guest_at_rest)
            session.unwoken = error
            return False
    session.unwoken = None
    durable.remove(session.layout.guest_at_rest)
    return True


def _was_silent(session: Session) -> bool:
    note = session.layout.guest_at_rest
    return running_qemu.is_noted(note) and running_qemu.word_of(note) != _MEANT


def try_again(session: Session) -> None:
    """What an earlier command could not do is tried once more; a guest that is still silent is told of."""
    if session.dry_run or session.unwoken is not None or not session.layout.guest_at_rest.exists():
        return
    rested = running_qemu.is_noted(session.layout.guest_at_rest)
    if not wake(session):
        tell(session)
    elif rested and session.is_active():
        session.say(f"the file systems of {session.home.name} were still at rest: its agent has woken them now")


def tell(session: Session) -> None:
    """People know that the guest may wait, and what they can do; the command goes on."""
    error, session.unwoken = session.unwoken, None
    if error is not None:
        session.say(f"{error}; {error.hint}")
