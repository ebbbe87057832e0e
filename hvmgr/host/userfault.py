"""Whether this host and this guest's QEMU can save memory in the background, and what an administrator does about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr.host import background_snapshot, libvirt_door

if TYPE_CHECKING:
    from hvmgr.host.domain import Domain

SYSCTL = "vm.unprivileged_userfaultfd"
SYSCTL_FILE = Path("/proc/sys/vm/unprivileged_userfaultfd")
DROP_IN = Path("/etc/sysctl.d/60-hvmgr.conf")
DROP_IN_TEXT = f"# hvmgr: QEMU may save the memory of a VM while its guest goes on (userfaultfd)\n{SYSCTL} = 1\n"
REMEDY = f"sysctl -w {SYSCTL}=1; to keep it, a line '{SYSCTL} = 1' in {DROP_IN} (hvmgr doctor --repair does both)"

# What QEMU says, and what it means. Source: QEMU, migration/migration.c and options.c (migrate_caps_check).
_WORDS = (
    ("not supported by host kernel", "QEMU gets no userfaultfd on this host", REMEDY),
    (
        "not compatible with guest memory",
        "the guest's memory is of a kind that QEMU cannot write-protect",
        "memory without huge pages or shared mappings; when an earlier snapshot failed, stop the VM and start it again",
    ),
    ("Invalid parameter", "this QEMU knows no background snapshot", "QEMU 6.0 or later"),
)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why the guest has to stand still while its memory is saved, and what would change that."""

    reason: str
    remedy: str


def find_obstacle(domain: Domain) -> Obstacle | None:
    """What is in the way, asked of libvirt and of the running QEMU itself; None when nothing is."""
    if not libvirt_door.can_pass_files():
        return Obstacle("libvirt's Python binding cannot pass files to QEMU", "libvirt-python 8.2 or later")
    if background_snapshot.has_helper(domain):
        return Obstacle("a helper process holds part of the VM's state", "an interface of another type than 'user'")
    words = background_snapshot.refusal(domain)
    return None if words is None else explain(words)


def explain(words: str) -> Obstacle:
    """QEMU's refusal in words for people."""
    for part, reason, remedy in _WORDS:
        if part in words:
            return Obstacle(reason, remedy)
    return Obstacle(f"QEMU refuses: {words.rstrip('.')}", "hvmgr doctor")
