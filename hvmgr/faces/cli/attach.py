"""``hvmgr image attach``, ``detach`` and ``attachments``: images as block devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import units
from hvmgr.faces.cli import json_out, render
from hvmgr.faces.cli.groups import READS, Command, Group
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.attaching import Shown
    from hvmgr.storage.attachments import Attachment

_FORMATS = ("vhd", "vhdx", "qcow2", "raw")
_HEADERS = ("Device", "Image", "Size", "Access", "State", "Partitions")


def register(group: Group) -> None:
    """The commands are commands of the group."""
    for one in (attach, detach, attachments):
        group.add_command(one)


@click.command(
    "attach",
    cls=Command,
    examples=[
        "hvmgr image attach disk.vhd",
        "hvmgr image attach --read-only '/var/lib/hvmgr/web/Virtual Hard Disks/vda.qcow2'",
    ],
)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--read-only", is_flag=True, help="The device cannot be written.")
@click.option("--format", "fmt", type=click.Choice(_FORMATS), help="The image's format, if it is not to be found out.")
@click.pass_obj
def attach(request: Request, path: Path, *, read_only: bool, fmt: str | None) -> None:
    """Show the disk in an image as a block device, with its partitions.

    The image may be raw, qcow2, VHDX, or any VHD, with all the parents that it has. What others need unchanged is attached
    read-only. It stays attached until 'image detach', or until the host is started again.
    """
    with request.host() as host, request.changing():
        shown = host.attach_image(path, read_only=read_only, format=fmt)
        one = shown.attachment
        request.done(f"attached {one.path} as {one.device}{_access(one)}", {"attachment": _document(shown)})
        for node, part in () if request.json else shown.partitions:
            render.say(f"{node}  {units.format_size(part.size)}  {part.name or part.type}")


@click.command("detach", cls=Command, examples=["hvmgr image detach /dev/loop0", "hvmgr image detach disk.vhd"])
@click.argument("device", metavar="DEVICE|PATH")
@click.pass_obj
def detach(request: Request, device: str) -> None:
    """Write everything out and take the block device away.

    Refused while the device or one of its partitions is mounted or open. When it succeeds, all that was written to the device
    is in the image, and the image's file is on the disk.
    """
    with request.host() as host, request.changing():
        one = host.detach_image(device)
        facts = {"path": one.path, "device": one.device}
        request.done(f"detached {one.path} from {one.device}", facts)


@click.command(
    "attachments", cls=Command, codes=READS, examples=["hvmgr image attachments", "hvmgr image attachments --json"]
)
@click.pass_obj
def attachments(request: Request) -> None:
    """List what is attached.

    An attachment that is left over, because a process of it died or the host was started again, is cleaned up by the next
    'image attach' or 'image detach', or by 'doctor --repair'.
    """
    with request.host() as host:
        found = host.attachments()
    if request.json:
        json_out.show({"attachments": [_document(one) for one in found]})
        return
    render.table(_HEADERS, [_row(one) for one in found], right=("Size",))


def _row(shown: Shown) -> tuple[str, ...]:
    one = shown.attachment
    return (
        one.device or "-",
        one.path,
        units.format_size(one.size),
        "read-only" if one.read_only else "writable",
        _state(shown),
        " ".join(node for node, _ in shown.partitions) or "-",
    )


def _access(one: Attachment) -> str:
    return ", read-only" if one.read_only else ""


def _state(shown: Shown) -> str:
    return "attached" if shown.is_alive else "left over"


def _document(shown: Shown) -> dict[str, Any]:
    one = shown.attachment
    return {
        "id": one.id,
        "path": one.path,
        "format": one.format,
        "size": one.size,
        "device": one.device,
        "read_only": one.read_only,
        "reason": one.reason,
        "state": _state(shown),
        "since": one.since,
        "images": list(one.images),
        "processes": [pid for pid, _ in one.processes],
        "partitions": [
            {
                "number": part.number,
                "device": node,
                "start": part.start,
                "size": part.size,
                "type": part.type,
                "name": part.name,
                "bootable": part.bootable,
            }
            for node, part in shown.partitions
        ],
    }
