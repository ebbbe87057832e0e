"""``hvmgr wim``: WIM files, and what is applied to disks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, units
from hvmgr.faces.cli import json_out, render
from hvmgr.faces.cli.groups import READS, Group
from hvmgr.faces.cli.prepare import layout_options, making_options, new_image
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.host.wimlib import WimImage, WimInfo

_COMPRESSIONS = ("none", "fast", "maximum", "solid")
_path = click.Path(path_type=Path)


@click.group("wim", cls=Group)
def command() -> None:
    """Work on WIM files: what is in one, capture into one, apply one to a disk image."""


@command.command("list", codes=READS, examples=["hvmgr wim list install.wim"])
@click.argument("wim", metavar="WIM", type=_path)
@click.pass_obj
def list_(request: Request, wim: Path) -> None:
    """List the images in a WIM."""
    with request.host() as host:
        found = host.wims.info(wim)
    if request.json:
        json_out.show({"wim": _document(found)})
        return
    headers = ("Index", "Name", "Size", "Files", "Folders", "Created", "Description")
    render.table(headers, [_row(one) for one in found.images], right=("Index", "Size", "Files", "Folders"))


@command.command("info", codes=READS, examples=["hvmgr wim info install.wim", "hvmgr wim info install.wim --verify"])
@click.argument("wim", metavar="WIM", type=_path)
@click.option("--verify", is_flag=True, help="Also read all of it, and compare it with its hashes.")
@click.pass_obj
def info(request: Request, wim: Path, *, verify: bool) -> None:
    """Show what a WIM is, and each image in it."""
    with request.host() as host:
        found = host.wims.info(wim, verify=verify)
    if request.json:
        json_out.show({"wim": _document(found), "verified": verify})
        return
    render.facts(_facts(found, verified=verify))
    for one in found.images:
        if render.is_terminal():
            render.say("")
        render.facts(_image_facts(one))


@command.command("capture", examples=["hvmgr wim capture os.vhd os.wim --name 'Server 2025'",
                                      "hvmgr wim capture /srv/files files.wim --compress fast"])  # fmt: skip
@click.argument("source", metavar="SOURCE", type=_path)
@click.argument("wim", metavar="WIM", type=_path)
@click.option("--name", metavar="NAME", help="The name of the image; without it that of SOURCE.")
@click.option("--description", metavar="TEXT", default="", help="What it is.")
@click.option("--compress", type=click.Choice(_COMPRESSIONS), default="maximum", help="maximum (LZX) without it.")
@click.option(
    "--partition", metavar="N", type=click.IntRange(min=1), help="Which one of a disk with several NTFS volumes."
)
@click.option("--append", is_flag=True, help="Add the image to a WIM that is there.")
@click.option("--unix", is_flag=True, help="Of a folder: keep owners, modes and device nodes of Linux, too.")
@click.pass_obj
def capture(request: Request, /, *, source: Path, wim: Path, **wish: Any) -> None:
    """Capture a folder, or the NTFS volume in a disk image, into a WIM.

    Of a volume everything is kept: security descriptors, named streams, reparse points, short names, attributes. It needs
    neither root nor a mount. No file is replaced; when it fails, no WIM is left, and with --append the old one is as it was.
    """
    from hvmgr.model.wim_options import WimCaptureOptions, WimCompression

    with request.host() as host, request.changing():
        options = WimCaptureOptions(
            wish["name"],
            wish["description"],
            WimCompression(wish["compress"]),
            wish["append"],
            wish["partition"],
            wish["unix"],
        )
        made = host.wims.capture(source, wim, options)
        last = made.images[-1]
        size = units.format_size(made.size)
        request.done(f"captured {source} into {wim} (image {last.index}, {size})", {"wim": _document(made)})


@command.command("apply", examples=["hvmgr wim apply install.wim os.vhd --image 2",
                                    "hvmgr wim apply install.wim new.vhd --size 60G --esp 260M --msr",
                                    "hvmgr wim apply --rootfs debian.tar.gz web.qcow2 --size 8G"])  # fmt: skip
@click.argument("source", metavar="SOURCE", type=_path)
@click.argument("image_file", metavar="IMAGE", type=_path)
@click.option("--image", metavar="N|NAME", help="Which image of a WIM that holds several.")
@click.option("--partition", metavar="N", type=click.IntRange(min=1), help="Which one of a disk with several volumes.")
@click.option("--rootfs", is_flag=True, help="SOURCE is a Linux root file system: a folder or a tar archive, for ext4.")
@click.option("--reformat", is_flag=True, help="Format the volume anew first: what is on it is lost.")
@making_options
@layout_options
@click.pass_obj
def apply(request: Request, /, *, source: Path, image_file: Path, **wish: Any) -> None:
    """Apply an image of a WIM to the NTFS volume in a disk image, or with --size to a new disk.

    Everything is kept: security descriptors, named streams, reparse points, short names, attributes. It needs neither root
    nor a mount. The volume has to be empty. When it fails, the disk is as it was.
    """
    from hvmgr.model.disk_layout import FileSystem, LayoutWish, TableKind
    from hvmgr.model.image_info import ImageOptions
    from hvmgr.model.wim_options import WimApplyOptions

    if wish["size"] is None and (wish["esp"] is not None or wish["msr"] or wish["table"] != "gpt"):
        raise errors.UsageError("--table, --esp and --msr are for a new disk", hint="give its size with --size")
    if wish["reformat"]:
        request.require_consent(f"all files on the volume of {image_file} are lost", always=True)
    fs = FileSystem.EXT4 if wish["rootfs"] else FileSystem.NTFS
    options = WimApplyOptions(
        image=wish["image"], partition=wish["partition"], reformat=wish["reformat"], rootfs=wish["rootfs"],
        size=wish["size"], layout=LayoutWish(fs, TableKind(wish["table"]), wish["label"], wish["esp"], wish["msr"]),
        new=new_image(wish) or ImageOptions(),
    )  # fmt: skip
    with request.host() as host, request.changing():
        done = host.wims.apply(source, image_file, options)
        where = "the whole disk" if done.partition == 0 else f"partition {done.partition}"
        facts = {"path": str(done.path), "partition": done.partition, "new": done.is_new, "source": str(source),
                 "image": done.source, "warnings": list(done.warnings)}  # fmt: skip
        request.done(f"applied {done.source} to {where} of {image_file}", facts)


# --- what is said -------------------------------------------------------------------------------------------------------


def _row(one: WimImage) -> tuple[str, ...]:
    created = "" if one.created is None else units.format_local(one.created)
    return (
        str(one.index),
        one.name,
        units.format_size(one.total),
        str(one.files),
        str(one.folders),
        created,
        one.description,
    )


def _facts(found: WimInfo, *, verified: bool) -> list[tuple[str, str]]:
    rows = [
        ("Path", str(found.path)),
        ("Size", units.format_size(found.size)),
        ("Id", found.guid),
        ("Compression", f"{found.compression}, chunks of {units.format_size(found.chunk_size)}" if found.chunk_size else found.compression),
        ("Part", f"{found.part[0]} of {found.part[1]}" if found.part[1] > 1 else ""),
        ("Boots", f"image {found.boot}" if found.boot else ""),
        ("Integrity table", "yes" if found.has_integrity else "no"),
        ("Images", str(len(found.images))),
        ("Verified", "every byte is what its hash says" if verified else ""),
    ]  # fmt: skip
    return [row for row in rows if row[1]]


def _image_facts(one: WimImage) -> list[tuple[str, str]]:
    rows = [
        ("Image", f"{one.index}"),
        ("Name", one.name),
        ("Description", one.description),
        ("Holds", f"{one.files} files in {one.folders} folders, {units.format_size(one.total)}"),
        ("Created", "" if one.created is None else units.format_local(one.created)),
        ("Changed", "" if one.changed is None else units.format_local(one.changed)),
        *((key.capitalize(), value) for key, value in one.windows.items()),
    ]
    return [row for row in rows if row[1]]


def _document(found: WimInfo) -> json_out.Document:
    def moment(when: Any) -> str | None:
        return None if when is None else units.to_rfc3339(when)

    return {
        "path": str(found.path), "size": found.size, "id": found.guid, "compression": found.compression,
        "chunk_size": found.chunk_size, "part": found.part[0], "parts": found.part[1], "boot": found.boot,
        "integrity": found.has_integrity,
        "images": [
            {"index": one.index, "name": one.name, "description": one.description, "files": one.files,
             "folders": one.folders, "total": one.total, "created": moment(one.created), "changed": moment(one.changed),
             "windows": one.windows}
            for one in found.images
        ],
    }  # fmt: skip
