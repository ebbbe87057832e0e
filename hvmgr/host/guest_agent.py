"""The agent inside a guest (qemu-guest-agent), which puts the guest's file systems to rest and wakes them up again.

Narrow and without decisions. Every call has a limit: a guest that hangs never answers. Its commands are those of QEMU's
qga/qapi-schema.json; a frozen guest's agent takes only those that ask for the state and that wake it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lxml import etree

from hvmgr import errors
from hvmgr.host import libvirt_door

if TYPE_CHECKING:
    from hvmgr.host.domain import Domain

_CHANNEL = "org.qemu.guest_agent.0"

ANSWER_S = 5
FREEZE_S = 60  # Windows lets its writers take that long; a guest with much unwritten data needs some of it
THAW_S = 30
_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why nobody would put the guest's file systems to rest now, and what would change that."""

    reason: str
    remedy: str


def is_connected(domain: Domain) -> bool:
    """Whether an agent holds the guest's end of the channel."""
    channels = etree.fromstring(domain.xml(live=True).encode()).findall("devices/channel/target")
    return any(one.get("name") == _CHANNEL and one.get("state") == "connected" for one in channels)


def find_obstacle(domain: Domain) -> Obstacle | None:
    """What is in the way of ``freeze``, asked of the agent itself; nothing is changed. None when nothing is."""
    if not is_connected(domain):
        return Obstacle(f"no guest agent answers in {domain.name}", "install and start qemu-guest-agent in the guest")
    try:
        rests = is_frozen(domain)
    except errors.OutcomeUnknown:
        raise
    except errors.HvmgrError as error:
        if is_silence(error):
            reason = f"the guest agent of {domain.name} gave no answer within {ANSWER_S} s"
            return Obstacle(reason, "see to it that the guest runs and its agent too")
        return Obstacle(
            f"the guest agent of {domain.name} refuses: {_words(error)}", "allow it the guest-fsfreeze commands"
        )
    if rests:
        return Obstacle(
            f"the file systems of {domain.name} are at rest already: somebody else needs that now",
            f"wait until that is done; if nobody is at it: virsh domfsthaw {domain.name}",
        )
    return None


def is_silence(error: errors.HvmgrError) -> bool:
    """Whether the agent did not answer in time, or is not there; as against: it said no."""
    libvirt = libvirt_door.library()
    return error.facts.get("libvirt_code") in {libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED}


def _words(error: errors.HvmgrError) -> str:
    """What a guest says is printed: nothing in it moves the cursor."""
    return "".join(one if one.isprintable() else "?" for one in str(error))


def is_frozen(domain: Domain) -> bool:
    """Whether the guest's file systems are at rest."""
    return bool(domain.ask_agent("guest-fsfreeze-status", timeout_s=ANSWER_S) == "frozen")


def freeze(domain: Domain, *, limit_s: float | None = None) -> int:
    """Puts the guest's file systems to rest; how many. After an error some may be, and ``thaw`` is called for."""
    seconds = FREEZE_S if limit_s is None else max(1, min(FREEZE_S, int(limit_s)))
    try:
        count = domain.ask_agent("guest-fsfreeze-freeze", timeout_s=seconds)
    except errors.OutcomeUnknown:
        raise
    except errors.HvmgrError as error:
        within = f" within {seconds} s" if is_silence(error) else ""
        raise errors.HostFailed(
            f"the guest agent of {domain.name} did not put its file systems to rest{within}: {_words(error)}"
        ) from error
    if not isinstance(count, int):  # the guest may answer anything
        raise errors.HostFailed(f"the guest agent of {domain.name} gave no number of file systems")
    return count


def thaw(domain: Domain, *, once: bool = False) -> str | None:
    """The guest's file systems take writes; fine when they did. HostFailed when the agent stays silent for ``THAW_S``.

    ``once`` asks a single time, for ``ANSWER_S`` at most: libvirt greets an agent for that long whatever it is told. What
    the agent said before it obeyed is returned: that of Windows says there that they rest no longer (VSS allows 10 s).
    """
    limit = ANSWER_S if once else THAW_S
    refusal: str | None = None
    deadline = time.monotonic() + (0 if once else limit)
    while True:
        try:
            domain.ask_agent("guest-fsfreeze-thaw", timeout_s=limit)
        except errors.OutcomeUnknown:
            raise
        except errors.HvmgrError as error:  # libvirt may just have lost sight of it, or it is still busy freezing
            if not domain.is_active():
                return refusal
            if not is_silence(error):
                refusal = _words(error)
            if time.monotonic() >= deadline:
                raise errors.HostFailed(
                    f"the file systems of {domain.name} may still be at rest: its agent did not wake them within"
                    f" {limit} s ({_words(error)})",
                    hint=f"every command on this VM tries again; virsh destroy {domain.name} ends its guest",
                ) from error
            time.sleep(_PAUSE_S)
        else:
            return refusal
