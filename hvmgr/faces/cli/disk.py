"""``hvmgr disk``: one disk of a VM."""

from __future__ import annotations

import click

from hvmgr.faces.cli import arguments, json_out
from hvmgr.faces.cli.groups import Group
from hvmgr.faces.cli.request import Request


@click.group("disk", cls=Group)
def command() -> None:
    """Work on the disks of a VM, each named by its slot."""


@command.command("localize", examples=["hvmgr disk localize web vda"])
@arguments.vm
@click.argument("slot", metavar="SLOT")
@click.pass_obj
def localize(request: Request, vm: str, slot: str) -> None:
    """Bring a disk into the VM's home, with all that its states stand on outside.

    Afterwards neither the present nor a snapshot needs the gold image, or the base that was used in place. The VM may run:
    then its working image takes in all that is below it.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        changed = one.localize(slot)
        what = "stands in its home" if changed else "needs nothing outside its home"
        facts = {"vm": json_out.vm(one, request.state(one)), "slot": slot, "disks": dict(one.now().disks)}
        request.done(f"disk {slot} of {one.name} {what}", facts, changed=changed)
