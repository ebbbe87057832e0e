"""``hvmgr mount``, ``unmount`` and ``mounts``: the file systems of VMs, snapshots, exports and images in directories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import json_out, key_files, render
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.mounting import Mounted, State
    from hvmgr.storage.attachments import Attachment


def _partition(_context: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """A number, or the name of a logical volume."""
    if value is not None and "/" not in value and not (value.isdecimal() and int(value) > 0):
        raise click.BadParameter(f"'{value}' is neither a number nor GROUP/VOLUME")
    return value


_HEADERS = ("Directory", "What", "File system", "Access", "State")


@click.command(
    "mount",
    cls=Command,
    examples=[
        "hvmgr mount web /mnt --snapshot 'before the update'",
        "hvmgr mount web /mnt --snapshot a --disk vda --partition 2 --writable",
        "hvmgr mount --home /media/backup/web /mnt",
    ],
)
@click.argument("words", metavar="VM DIR", nargs=-1)
@click.option("--snapshot", metavar="SNAP", help="As it was then; without it as it is now, or at the latest snapshot.")
@click.option("--disk", "slot", metavar="SLOT", help="The disk, where the VM has several file systems.")
@click.option("--partition", metavar="N|GROUP/VOLUME", callback=_partition,
              help="The partition, by its number, or the logical volume of this name.")  # fmt: skip
@key_files.option
@click.option("--writable", is_flag=True, help="Let it be written: all writes go into an image of their own on top.")
@click.option("--home", metavar="FOLDER", type=click.Path(path_type=Path),
              help="An export, or a VM's home wherever it lies, instead of a VM.")  # fmt: skip
@click.option("--image", metavar="FILE", type=click.Path(path_type=Path), help="An image file instead of a VM.")
@click.pass_obj
def mount(request: Request, /, words: tuple[str, ...], *, partition: str | None, **options: Any) -> None:
    """Mount a file system of a VM, of a snapshot, an export or an image in an empty directory.

    To be read, straight from its images, which are never written. With --writable all writes go into an image on top, which
    'unmount' throws away, or keeps.
    """
    from hvmgr.operations.mounting import Wanted

    vm, directory = _vm_and_directory(words, options["home"], options["image"])
    wanted = Wanted(
        vm=vm,
        folder=options["home"],
        image=options["image"],
        snapshot=options["snapshot"],
        slot=options["slot"],
        partition=partition,
        writable=options["writable"],
        keys=tuple(key_files.read(options["key_files"])),
    )
    with request.host() as host, request.changing():
        made = host.mount(directory, wanted)
        one = made.mount
        access = "to be written; its images are not" if one.writable else "to be read"
        request.done(
            f"mounted {one.title} ({one.file_system}) at {one.directory}, {access}",
            {"mount": _document(made.attachment, made.state)},
        )


@click.command(
    "unmount", cls=Command, examples=["hvmgr unmount /mnt", "hvmgr unmount /mnt --keep /srv/images/changed.qcow2"]
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--keep", metavar="AS", type=click.Path(path_type=Path),
              help="What was written becomes this file, an image on top of what was mounted.")  # fmt: skip
@click.pass_obj
def unmount(request: Request, directory: Path, *, keep: Path | None) -> None:
    """Unmount what 'mount' has mounted; what was written is thrown away, unless it is kept.

    Refused while a program uses it. It cleans up a mount that was broken off, too.
    """
    with request.host() as host, request.changing():
        one = host.unmount(directory, keep=keep)
        place = one.mount
        assert place is not None
        kept = f"; what was written is {place.kept}, which stands on {one.path}" if place.kept is not None else ""
        request.done(
            f"unmounted {place.directory}{kept}",
            {"directory": place.directory, "kept": place.kept, "parent": None if place.kept is None else one.path},
        )


@click.command("mounts", cls=Command, codes=READS, examples=["hvmgr mounts", "hvmgr mounts --json"])
@click.pass_obj
def mounts(request: Request) -> None:
    """List what 'mount' has mounted on this host, and what is left over of that.

    A mount is left over when a process of it died, or the host was started again: 'unmount' cleans it up.
    """
    with request.host() as host:
        found = host.mounts()
    if request.json:
        json_out.show({"mounts": [_document(one.attachment, one.state) for one in found]})
        return
    render.table(_HEADERS, [_row(one) for one in found])


def _vm_and_directory(words: tuple[str, ...], home: Path | None, image: Path | None) -> tuple[str | None, Path]:
    """An image needs no VM, and an export or a home names it itself, unless it holds several."""
    if home is not None and image is not None:
        raise errors.UsageError("--home and --image exclude each other", hint="name one of them")
    if len(words) == 2 and image is None:
        return words[0], Path(words[1])
    if len(words) == 1 and (home is not None or image is not None):
        return None, Path(words[0])
    hint = "hvmgr mount VM DIR, or: hvmgr mount --home FOLDER DIR, hvmgr mount --image FILE DIR"
    raise errors.UsageError("mount needs what to mount, and an empty directory", hint=hint)


def _row(one: Mounted) -> tuple[str, ...]:
    place = one.mount
    return (
        place.directory,
        place.title,
        place.file_system,
        "writable" if place.writable else "read-only",
        one.state.value,
    )


def _document(one: Attachment, state: State) -> dict[str, Any]:
    place = one.mount
    assert place is not None
    return {
        "directory": place.directory,
        "state": state.value,
        "what": place.title,
        "vm": place.vm,
        "snapshot": place.snapshot,
        "slot": place.slot,
        "partition": place.partition,
        "logical": place.logical,
        "encrypted": place.encrypted,
        "file_system": place.file_system,
        "writable": place.writable,
        "overlay": place.overlay,
        "device": one.device,
        "images": list(one.images),
        "since": one.since,
    }
