"""``hvmgr disk``: one disk of a VM."""

from __future__ import annotations

import click

from hvmgr import units
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Group
from hvmgr.faces.cli.request import Request
from hvmgr.model import names


@click.group("disk", cls=Group)
def command() -> None:
    """Work on the disks of a VM, each named by its slot."""


@command.command("info", codes=READS, examples=["hvmgr disk info web vda", "hvmgr disk info web vda --json"])
@arguments.vm
@click.argument("slot", metavar="SLOT")
@click.pass_obj
def info(request: Request, vm: str, slot: str) -> None:
    """Show a disk as it is at present: its size, its images, and its sizes in the snapshots."""
    with request.host() as host:
        one = host.vm(vm)
        forest = one.tree()
        path = forest.present.disks.get(slot)
        if path is None:
            raise names.not_found("disk", slot, forest.present.disks, where=f"in {one.name}")
        chain = forest.chain(path)
        sizes = [
            (shot, forest.images[shot.disks[slot]].size)
            for shot in one.snapshots()
            if shot.disks.get(slot) in forest.images
        ]
        if request.json:
            json_out.show(
                {
                    "vm": json_out.vm(one, request.state(one)),
                    "slot": slot,
                    "size": chain[0].size,
                    "chain": [json_out.image(image) for image in chain],
                    "snapshots": [{"id": shot.id, "name": shot.name, "size": size} for shot, size in sizes],
                }
            )
            return
    render.facts([("size", units.format_size(chain[0].size)), ("format", chain[0].format)])
    rows = [("image", image.path, units.format_size(image.size), units.format_size(image.data)) for image in chain]
    rows += [("snapshot", shot.name, units.format_size(size), "-") for shot, size in sizes]
    render.table(("What", "Name", "Size", "Takes"), rows, right=("Size", "Takes"))


@command.command("resize", examples=["hvmgr disk resize web vda 40G", "hvmgr disk resize web vda 10G --yes"])
@arguments.vm
@click.argument("slot", metavar="SLOT")
@click.argument("size", metavar="SIZE", type=arguments.Size())
@click.pass_obj
def resize(request: Request, vm: str, slot: str, size: int) -> None:
    """Give a disk another size; its snapshots keep theirs.

    It grows while the VM is off or runs; the guest then makes its partitions and file systems larger. It gets smaller only while
    the VM is off, only down to the end of the last partition, and only with --yes where nobody can be asked.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        path = one.now().disks.get(slot)
        before = None if path is None else one.tree().images[path].size
        if before is not None and size < before:
            cut = f"{units.format_size(before - size)} at the end of disk {slot} of {one.name} go for good"
            request.require_consent(cut, always=True)
        changed = one.resize_disk(slot, size, shrink=True)
        what = f"has {units.format_size(size)}" + ("" if changed else " already")
        facts = {"vm": json_out.vm(one, request.state(one)), "slot": slot, "size": size, "disks": dict(one.now().disks)}
        request.done(f"disk {slot} of {one.name} {what}", facts, changed=changed)


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


@command.command("convert", examples=["hvmgr disk convert web vda", "hvmgr disk convert web vda --dry-run"])
@arguments.vm
@click.argument("slot", metavar="SLOT")
@click.pass_obj
def convert(request: Request, vm: str, slot: str) -> None:
    """Make a disk that stands on a VHD qcow2, so that snapshots of the running VM can have its memory.

    The VHD is written once as a qcow2 image of the VM's home, and every state that stood on it stands on that. The VHD itself
    stays as it is, and nothing needs it any more. The VM may run: then its working image takes in all that is below it.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        changed = one.convert_disk(slot)
        what = "stands on no VHD any more; the VHD stays as it is" if changed else "stands on no VHD"
        facts = {"vm": json_out.vm(one, request.state(one)), "slot": slot, "disks": dict(one.now().disks)}
        request.done(f"disk {slot} of {one.name} {what}", facts, changed=changed)
