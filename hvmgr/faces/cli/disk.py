"""``hvmgr disk``: one disk of a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hvmgr import errors, units
from hvmgr.faces.cli import arguments, json_out, render, streams
from hvmgr.faces.cli.groups import READS, Group
from hvmgr.faces.cli.request import Request
from hvmgr.model import names

if TYPE_CHECKING:
    from hvmgr.operations.transfer.recurrence import FoundDisk


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
            one.require_resizable(slot, size)
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


@command.command("export", examples=["hvmgr disk export web vda web-vda.vhd --progress",
                                     "hvmgr disk export web vda delta.vhd --snapshot tuesday --base monday",
                                     "hvmgr disk export web vda - --format raw | ssh other 'cat > /dev/vg/web'"])  # fmt: skip
@arguments.vm
@click.argument("slot", metavar="SLOT")
@click.argument("file", metavar="FILE|-", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--snapshot", metavar="SNAP", type=arguments.SnapshotName(), help="As this snapshot has it.")
@click.option("--base", metavar="SNAP", type=arguments.SnapshotName(),
              help="Only what differs from this snapshot, as a differencing VHD on it.")  # fmt: skip
@click.option("--format", "fmt", type=click.Choice(streams.FORMATS),
              help="Of the stream; without it what the name of FILE says, else vhd.")  # fmt: skip
@click.option("--if-exists", type=click.Choice(["fail", "same", "keep"]), default="fail", show_default=True,
              help="Where FILE is there: same leaves it if it is what would be written, by its bytes, keep in any case.")  # fmt: skip
@click.option("--progress", is_flag=True, help="Say how far it is, and how long it took, on stderr.")
@click.pass_obj
def export(
    request: Request,
    vm: str,
    slot: str,
    file: str,
    snapshot: str | None,
    base: str | None,
    fmt: str | None,
    *,
    if_exists: str,
    progress: bool,
) -> None:
    """Write one disk into a new file or to stdout: as a whole, or what changed since a snapshot.

    The VM may run: its disk is that of one moment. A delta fits any point of the same disk as its base, in whichever
    branch of the tree. Everything that can be refused is refused before the first byte.
    """
    streams.require_target(request, file, if_exists)
    report = streams.Report(request, wanted=progress)
    with request.host() as host, request.changing():
        one, kind, path = host.vm(vm), streams.format_of(fmt, file), streams.path_of(file)
        facts = {"vm": {"id": one.id, "name": one.name}, "slot": slot}
        if if_exists != "fail":
            target, compare = arguments.absolute(file), if_exists == "same"
            found = one.find_disk_export(target, slot, snapshot=snapshot, base=base, format=kind, compare=compare)
            if found is not None:
                _require_same(found, file)
                request.done(f"{file} is there already", {**facts, **json_out.stream(found, file)}, changed=False)
                return
        with one.export_disk(slot, snapshot=snapshot, base=base, format=kind, path=path) as stream:
            streams.write(request, stream, file, report)
        report.end()
        if file != streams.STANDARD:
            said = f"exported {stream.name} to {file} ({streams.size(stream)})"
            request.done(said, {**facts, **json_out.stream(stream, file)})


def _require_same(found: FoundDisk, file: str) -> None:
    if found.is_same is False:
        raise errors.Conflict(
            f"{file} is there, and is not what would be written",
            hint="give the new one another name, remove that one, or keep it with --if-exists keep",
            path=file,
        )


@command.command("import", examples=["hvmgr disk import web vda web-vda.vhd", "hvmgr disk import web vda delta.vhd",
                                     "ssh other 'cat /dev/vg/web' | hvmgr disk import web vda - --format raw"])  # fmt: skip
@arguments.vm
@click.argument("slot", metavar="SLOT")
@click.argument("file", metavar="FILE|-", type=click.Path(allow_dash=True))
@click.option("--format", "fmt", type=click.Choice(streams.FORMATS),
              help="Of the stream; without it what the name of FILE says, else vhd.")  # fmt: skip
@click.option(
    "--force", is_flag=True, help="Take a delta on something else, or raw bytes that look wrong, all the same."
)
@click.option("--progress", is_flag=True, help="Say how far it is, and how long it took, on stderr.")
@click.pass_obj
def import_(request: Request, vm: str, slot: str, file: str, fmt: str | None, *, force: bool, progress: bool) -> None:
    """Replace what a disk holds by a file or by stdin: a whole disk, or a delta on what it holds.

    The VM has to be off; its snapshots keep what they have. The disk changes when all has arrived, and not at all when
    anything is wrong. Which of both it is says a VHD itself; everything else is a whole disk, which leaves no old data.
    """
    report = streams.Report(request, wanted=progress)
    with request.host() as host, request.changing(), streams.source(file) as (stream, length):
        one = host.vm(vm)
        request.require_consent(f"what disk {slot} of {one.name} holds now goes for good")
        name = "stdin" if file == streams.STANDARD else file
        made = streams.format_of(fmt, file)
        one.import_disk(slot, stream, format=made, length=length, force=force, name=name)
        report.end()
        facts = {
            "vm": {"id": one.id, "name": one.name},
            "slot": slot,
            "format": made.value,
            "disks": dict(one.now().disks),
        }
        request.done(f"imported {name} into disk {slot} of {one.name}", facts)


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
