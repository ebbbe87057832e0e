"""Disks that stand on a VHD: QEMU runs on it, but saves no memory meanwhile; and what an administrator does about it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from hvmgr.model.tree import Image
from hvmgr.operations.session import Session
from hvmgr.storage import images


def below(chain: Iterable[Image]) -> dict[str, Image]:
    """Those of these images that are VHDs."""
    return {one.path: one for one in chain if one.format == images.VPC}


def find_slots(session: Session) -> list[str]:
    """The disks of the present that stand on a VHD."""
    before = session.home.present_tree()
    return [slot for slot, path in before.present.disks.items() if below(before.chain(path))]


def find_reason(session: Session) -> tuple[str, str] | None:
    """Why QEMU cannot save the VM's memory, where that is a VHD, and what makes it able to; None when it is not."""
    slots = find_slots(session)
    if not slots:
        return None
    return f"disk {slots[0]} stands on a VHD", f"{way_out(session.home.name, slots[0])} (the VM may run meanwhile)"


def way_out(name: str, slot: str) -> str:
    """The command after which it can."""
    return f"make the disk qcow2 once: hvmgr disk convert {shlex.quote(name)} {slot}"


def say_what_it_costs(session: Session, name: str, formats: Iterable[tuple[str, str]]) -> None:
    """One line for a VM that comes to stand on VHDs; ``formats`` are its disks: slot, format of the base."""
    for slot, fmt in formats:
        if fmt == images.VPC:
            session.say(
                f"disk {slot} stands on a VHD, so that snapshots of the running VM cannot have its memory; "
                f"{way_out(name, slot)}"
            )
