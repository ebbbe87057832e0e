"""The agent inside a guest (qemu-guest-agent), which puts the guest's file systems to rest and wakes them up again.

Narrow and without decisions. Every call has a limit: a guest that hangs never answers. Its commands are those of QEMU's
qga/qapi-schema.json; a frozen guest's agent takes only those that ask for the state and that wake it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lxml import etree

from hvmgr import errors

if TYPE_CHECKING:
    from hvmgr.host.domain import Domain

_CHANNEL = "org.qemu.guest_agent.0"

ANSWER_S = 5
FREEZE_S = 60  # Windows lets its writers take that long; a guest with much unwritten data needs some of it
THAW_S = 30
_PAUSE_S = 0.5


def is_connected(domain: Domain) -> bool:
    """Whether an agent holds the guest's end of the channel."""
    channels = etree.fromstring(domain.xml(live=True).encode()).findall("devices/channel/target")
    return any(one.get("name") == _CHANNEL and one.get("state") == "connected" for one in channels)


def require(domain: Domain) -> None:
    """Conflict when no agent would put the file systems to rest now: there is none, it is silent, or they rest already."""
    if not is_connected(domain):
        raise errors.Conflict(
            f"no guest agent answers in {domain.name}: nobody can put its file systems to rest",
            hint="install and start qemu-guest-agent in the guest, or leave out --quiesce",
        )
    try:
        rests = is_frozen(domain)
    except errors.HvmgrError as error:
        raise errors.Conflict(
            f"the guest agent of {domain.name} gave no answer within {ANSWER_S} s: {error}",
            hint="see to it that the guest runs and its agent too, or leave out --quiesce",
        ) from error
    if rests:
        raise errors.Conflict(
            f"the file systems of {domain.name} are at rest already: somebody else needs that now",
            hint=f"wait until that is done; if nobody is at it: virsh domfsthaw {domain.name}",
        )


def is_frozen(domain: Domain) -> bool:
    """Whether the guest's file systems are at rest."""
    return bool(domain.ask_agent("guest-fsfreeze-status", timeout_s=ANSWER_S) == "frozen")


def freeze(domain: Domain) -> int:
    """Puts the guest's file systems to rest; how many. After an error some may be, and ``thaw`` is called for."""
    count = domain.ask_agent("guest-fsfreeze-freeze", timeout_s=FREEZE_S)
    if not isinstance(count, int):  # the guest may answer anything
        raise errors.HostFailed(f"the guest agent of {domain.name} gave no number of file systems")
    return count


def thaw(domain: Domain) -> None:
    """The guest's file systems take writes; fine when they did. HostFailed when the agent stays silent for ``THAW_S``."""
    deadline = time.monotonic() + THAW_S
    while True:
        try:
            domain.ask_agent("guest-fsfreeze-thaw", timeout_s=THAW_S)
        except errors.OutcomeUnknown:
            raise
        except errors.HvmgrError as error:  # libvirt may just have lost sight of it, or it is still busy freezing
            if not domain.is_active():
                return
            if time.monotonic() > deadline:
                raise errors.HostFailed(
                    f"the file systems of {domain.name} may still be at rest: its agent does not wake them ({error})",
                    hint=f"if its guest runs, run the command again; virsh destroy {domain.name} ends it",
                ) from error
            time.sleep(_PAUSE_S)
        else:
            return
