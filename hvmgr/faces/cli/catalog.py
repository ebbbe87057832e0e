"""``hvmgr catalog``: images that are kept to make disks and VMs of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, settings, units
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Group
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.specification import Specification
    from hvmgr.model.wim_options import WimApplyOptions
    from hvmgr.operations.host import Host
    from hvmgr.operations.images.cataloguing import Images
    from hvmgr.storage.catalog import Entry

_path = click.Path(path_type=Path)
_FORMATS = ("vhd", "vhdx", "qcow2", "raw")


def _place(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--catalog", "folder", metavar="DIR", type=_path, envvar="HVMGR_CATALOG", show_envvar=True,
        help="The catalog's folder; without it ROOT-catalog, beside the root of the VMs.",
    )(function)  # fmt: skip


@click.group("catalog", cls=Group)
def command() -> None:
    """Keep images in a catalog, and make disks and VMs of them.

    A catalog is a folder that any web server can serve: the images, with checksums and answer files, and catalog.json.
    """


@command.command("add", examples=["hvmgr catalog add debian.qcow2 --group Linux --answer user-data.yaml",
                                  "hvmgr catalog add install.wim --name server-2025 --group Windows"])  # fmt: skip
@click.argument("file", metavar="FILE", type=_path)
@click.option("--name", metavar="NAME", help="The name in the catalog; without it that of FILE, without its suffix.")
@click.option("--group", metavar="GROUP", default="Default", show_default=True, help="The group that it belongs to.")
@click.option("--description", metavar="TEXT", default="", help="What it is.")
@click.option(
    "--answer", metavar="FILE", type=_path, help="An unattend.xml, or cloud-init's user data, for its system."
)
@_place
@click.pass_obj
def add(request: Request, /, *, file: Path, folder: Path | None, **wish: Any) -> None:
    """Copy a complete image (VHD, VHDX, qcow2, raw) or a WIM into the catalog."""
    with request.host() as host, request.changing():
        catalog = _catalog(host, folder)
        made = catalog.add(file, **wish)
        request.done(
            f"added {made.name} ({made.kind}, {units.format_size(made.size)}) to {catalog.folder}", _facts(made)
        )


@command.command("list", codes=READS, examples=["hvmgr catalog list", "hvmgr catalog list --group Linux --verify"])
@click.option("--group", metavar="GROUP", help="Only this group.")
@click.option(
    "--verify", is_flag=True, help="Compare every file with its checksum; the exit code is 6 when one differs."
)
@_place
@click.pass_context
def list_(context: click.Context, /, *, group: str | None, verify: bool, folder: Path | None) -> None:
    """List the images of the catalog."""
    request: Request = context.obj
    with request.host() as host:
        catalog = _catalog(host, folder)
        found = catalog.entries(group)
        wrong = catalog.verify() if verify else []
    if request.json:
        shown = [one.document() for one in found]
        json_out.show({"folder": str(catalog.folder), "images": shown, "wrong": wrong})
    else:
        headers = ("Group", "Name", "Kind", "Size", "Disk", "Answer", "Description")
        render.table(headers, map(_row, found), right=("Size", "Disk"))
        for one in wrong:
            render.notice(one)
    context.exit(errors.Corrupt.exit_code if wrong else 0)


@command.command("group", examples=["hvmgr catalog group debian ubuntu Linux"])
@click.argument("names", metavar="NAME…", nargs=-1, required=True)
@click.argument("group", metavar="GROUP")
@_place
@click.pass_obj
def group(request: Request, /, *, names: tuple[str, ...], group: str, folder: Path | None) -> None:
    """Put images of the catalog into a group."""
    with request.host() as host, request.changing():
        moved = _catalog(host, folder).move(names, group)
        request.done(f"{', '.join(names)}: group {group}", {"images": [one.document() for one in moved]})


@command.command("remove", examples=["hvmgr catalog remove debian",
                                     "hvmgr catalog remove debian --gone /srv/vms/web.vhd"])  # fmt: skip
@click.argument("name", metavar="NAME")
@click.option(
    "--gone", metavar="FILE", type=_path, multiple=True,
    help="An image that was made on it here, or the home of such a VM, and was removed since, not moved. Repeatable.",
)  # fmt: skip
@_place
@click.pass_obj
def remove(request: Request, /, *, name: str, gone: tuple[Path, ...], folder: Path | None) -> None:
    """Remove an image from the catalog, with its file; refused while something stands on it."""
    request.require_consent(f"the image '{name}' is removed from the catalog, with its file")
    with request.host() as host, request.changing():
        removed = _catalog(host, folder).remove(name, gone=gone)
        request.done(f"removed {name}", _facts(removed))


@command.command("deploy", examples=["hvmgr catalog deploy debian --to web --memory 2G",
                                     "hvmgr catalog deploy debian --to /srv/vms/ --linked",
                                     "hvmgr catalog deploy server-2025 --to ./ --size 60G --esp 260M --image 2"])  # fmt: skip
@click.argument("name", metavar="NAME")
@click.option(
    "--to", "target", metavar="VM|DIR", required=True, help="A new VM of that name; or a folder, with a / in it."
)
@click.option("--linked", is_flag=True, help="A differencing image on the catalog's own, in place of a copy.")
@click.option("--without-answer", is_flag=True, help="Leave the image's answer file out.")
@click.option("--memory", type=arguments.Size(), metavar="SIZE", help="Of the VM; the template decides otherwise.")
@click.option("--vcpus", type=click.IntRange(min=1), metavar="N", help="Of the VM; the template decides otherwise.")
@click.option("--template", metavar="T", help="Of the VM: generation1, or generation2, the default.")
@click.option("--network", "networks", multiple=True, metavar="NET", help="Of the VM, as of 'vm create'. Repeatable.")
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True,
              help="Of the VM, as of 'vm create'.")  # fmt: skip
@click.option("--size", metavar="S", type=arguments.Size(), help="Of a WIM: the size of the disk that is made.")
@click.option("--image", metavar="N|NAME", help="Of a WIM: which of its images.")
@click.option(
    "--format", "image_format", type=click.Choice(_FORMATS), help="Of a WIM: the disk's format; vhd without it."
)
@click.option("--esp", metavar="S", type=arguments.Size(), help="Of a WIM: an EFI system partition of this size.")
@_place
@click.pass_obj
def deploy(request: Request, /, *, name: str, target: str, folder: Path | None, **wish: Any) -> None:
    """Make a disk image in a folder, or a new VM, of an image in the catalog.

    A copy is compared with its checksum. The answer file is put into the system on the new disk, where it is read at the
    first start. Of a WIM a new disk is made, in a folder only: a WIM brings nothing that starts it.
    """
    linked, answered = wish["linked"], not wish["without_answer"]
    with request.host() as host, request.changing():
        catalog = _catalog(host, folder)
        if "/" in target or target in {".", ".."}:
            made = catalog.deploy(name, Path(target), linked=linked, answered=answered, wim=_wim_options(wish))
            request.done(f"deployed {name} to {made}", {"image": name, "path": str(made), "vm": None, "linked": linked})
            return
        vm = catalog.deploy_vm(name, _specification(target, wish), linked=linked, answered=answered)
        facts = {"image": name, "path": str(vm.path), "vm": vm.name, "linked": linked}
        request.done(f"deployed {name} to the VM {vm.name} in {vm.path}", facts)


@command.command("netboot", examples=["hvmgr catalog netboot --url http://deploy/catalog",
                                      "hvmgr catalog netboot debian --url http://deploy/catalog --expand",
                                      "hvmgr catalog netboot debian --url http://deploy/catalog --default debian"])  # fmt: skip
@click.argument("names", metavar="NAME…", nargs=-1)
@click.option("--url", metavar="URL", required=True, help="Where a web server shows the catalog's folder: http://….")
@click.option("--expand", is_flag=True, help="Write what a VHD shows to the whole disk, not the VHD to a volume of it.")
@click.option(
    "--disk", metavar="DISK", help="The machines' disk: name (sda), serial number or wwid; without it their only one."
)
@click.option(
    "--overwrite", is_flag=True, help="Offer to give up what the disk, or a VHD of the same name on it, holds."
)
@click.option(
    "--default", metavar="NAME", help="What a blank disk gets when nobody chooses; one that starts anything is started."
)
@click.option("--timeout", "timeout_s", metavar="S", type=click.IntRange(min=0), default=15, show_default=True,
              help="Seconds in which somebody may choose; 0 asks nobody.")  # fmt: skip
@click.option("--append", "arguments", metavar="ARGS", default="", help="More arguments of the environment's kernel.")
@click.option("--kernel", metavar="FILE", type=_path, help="The environment's kernel; without it this host's newest.")
@click.option("--modules", metavar="DIR", type=_path, help="The folder lib/modules/VERSION of that kernel.")
@_place
@click.pass_obj
def netboot(request: Request, /, *, names: tuple[str, ...], folder: Path | None, **wish: Any) -> None:
    """Let machines that start over the network get images of the catalog onto their disks.

    Writes a script for iPXE and a small boot environment into the catalog's folder. A VHD is put on a volume of the machine's
    disk, with a boot entry; a raw image is written to the whole disk. A disk that holds anything else is left alone.
    """
    from hvmgr.model.netboot import NetbootOptions

    with request.host() as host, request.changing():
        made = _catalog(host, folder).netboot(NetbootOptions(names=names, **wish))
        for name, why in made.left_out:
            host.reporter.notice(f"'{name}' is left out: {why}")
        request.done(
            f"machines start {made.url}",
            {
                "folder": str(made.folder),
                "url": made.url,
                "images": [{"name": one.name, "how": one.how.value} for one in made.offers],
                "left_out": [{"name": name, "why": why} for name, why in made.left_out],
            },
        )


def _catalog(host: Host, folder: Path | None) -> Images:
    return host.catalog(folder or Path(f"{os.fspath(host.root).rstrip('/') or settings.default_root()}-catalog"))


def _specification(name: str, wish: dict[str, Any]) -> Specification:
    from hvmgr.model import specification

    spec = specification.Specification(
        name=name,
        template=wish["template"] or specification.DEFAULT_TEMPLATE,
        memory=wish["memory"],
        vcpus=wish["vcpus"],
        networks=specification.parse_networks(wish["networks"]),
        accel=specification.Acceleration(wish["accel"]),
    )
    specification.check(spec)
    return spec


def _wim_options(wish: dict[str, Any]) -> WimApplyOptions:
    from hvmgr.model.disk_layout import FileSystem, LayoutWish
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.model.image_info import ImageOptions
    from hvmgr.model.wim_options import WimApplyOptions

    layout = LayoutWish(FileSystem.NTFS, esp=wish["esp"], msr=wish["esp"] is not None)
    new = ImageOptions(format=ImageFormat(wish["image_format"] or "vhd"))
    return WimApplyOptions(image=wish["image"], size=wish["size"], layout=layout, new=new)


def _row(one: Entry) -> tuple[str, ...]:
    disk = "" if one.disk is None else units.format_size(one.disk)
    answer = "" if one.answer is None else one.answer.kind.value
    return (one.group, one.name, one.kind, units.format_size(one.size), disk, answer, one.description)


def _facts(one: Entry) -> json_out.Document:
    return {"image": one.document()}
