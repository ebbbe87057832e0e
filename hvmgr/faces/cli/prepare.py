"""``hvmgr image prepare`` and ``image generalize``: a disk before its first system, and after its last change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.disk_layout import Layout, LayoutWish
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.model.image_info import ImageOptions
    from hvmgr.operations.images.generalizing import Generalisation

_TABLES = ("gpt", "mbr", "none")
_FILE_SYSTEMS = ("ntfs", "ext4", "fat32", "xfs", "btrfs")
_FORMATS = ("vhd", "vhdx", "qcow2", "raw")


def layout_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a disk is divided."""
    options = (
        click.option("--table", type=click.Choice(_TABLES), default="gpt", help="The partition table; gpt without it."),
        click.option("--label", metavar="NAME", default="", help="The label of the volume."),
        click.option(
            "--esp", metavar="S", type=arguments.Size(), help="An EFI system partition of this size, such as 260M."
        ),
        click.option(
            "--msr", is_flag=True, help="Microsoft's reserved partition (16 MiB), as Windows makes it on a GPT."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def making_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that can make the image, too."""
    options = (
        click.option("--size", metavar="S", type=arguments.Size(), help="Make a new image with a disk of this size."),
        click.option(
            "--format", "image_format", type=click.Choice(_FORMATS), help="Of a new image; else by the suffix."
        ),
        click.option("--fixed/--dynamic", default=False, help="Of a new image: all space at once, or as it is needed."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    "prepare",
    cls=Command,
    examples=[
        "hvmgr image prepare os.vhd --esp 260M --msr --label Windows",
        "hvmgr image prepare data.qcow2 --size 20G --fs ext4 --label data",
    ],
)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--fs", type=click.Choice(_FILE_SYSTEMS), help="Of the volume; without it ntfs on VHD and VHDX, else ext4."
)
@layout_options
@making_options
@click.option("--force", is_flag=True, help="Prepare an image that holds data, which is lost.")
@click.pass_obj
def prepare(request: Request, /, *, path: Path, fs: str | None, force: bool, **wish: Any) -> None:
    """Partition, format and label a blank image, or with --size a new one. It needs no root.

    One volume takes the rest of the disk behind the partitions that boot it. An image that holds data, that a VM uses or that
    has children is refused. When the command fails, the image is as it was.
    """
    if force and wish["size"] is None:
        request.require_consent(f"whatever {path} holds is lost", always=True)
    with request.host() as host, request.changing():
        options = new_image(wish)
        found = host.images.prepare(path, wanted(host, path, fs, wish), size=wish["size"], options=options, force=force)
        request.done(f"prepared {path} ({_summary(found)})", {"path": str(path), **document(found)})


def wanted(host: Any, path: Path, fs: str | None, wish: dict[str, Any]) -> LayoutWish:
    """The layout that the options describe."""
    from hvmgr.model.disk_layout import FileSystem, LayoutWish, TableKind

    chosen = FileSystem(fs) if fs is not None else host.images.usual_file_system(path, new=new_image(wish))
    return LayoutWish(chosen, TableKind(wish["table"]), wish["label"], wish["esp"], wish["msr"])


def new_image(wish: dict[str, Any]) -> ImageOptions | None:
    """How a new image is wanted; None when one that is there is meant."""
    if wish["size"] is None:
        if wish["image_format"] is not None or wish["fixed"]:
            raise errors.UsageError("--format and --fixed are for a new image", hint="give its size with --size")
        return None
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.model.image_info import ImageOptions

    fmt: ImageFormat | None = None if wish["image_format"] is None else ImageFormat(wish["image_format"])
    return ImageOptions(format=fmt, fixed=wish["fixed"])


def document(found: Layout) -> json_out.Document:
    """A layout as JSON."""
    return {
        "table": found.table.value,
        "partitions": [
            {"number": one.number, "role": one.role.value, "start": one.start, "size": one.size,
             "filesystem": None if one.file_system is None else one.file_system.value, "label": one.label}
            for one in found.volumes
        ],
    }  # fmt: skip


def _summary(found: Layout) -> str:
    return "; ".join(one.describe() for one in found.volumes)


@click.command(
    "generalize",
    cls=Command,
    examples=["hvmgr image generalize debian.qcow2 --dry-run", "hvmgr image generalize debian.qcow2"],
)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--partition", metavar="N", type=click.IntRange(min=1), help="Which one of a disk with several systems.")
@click.pass_obj
def generalize(request: Request, /, *, path: Path, partition: int | None) -> None:
    """Take out of a Linux system what makes it the one that it is, so that many machines can be made of its image.

    Machine id, ssh host keys, DHCP leases and ids, random seed, logs, names of network cards, cloud-init's state, shell
    histories: of a system on ext2, ext3 or ext4, without root and without mounting it. Of a Windows it is only said whether
    sysprep has generalised it. An image that a VM uses, or that has children, is refused.
    """
    with request.host() as host, request.changing():
        done = host.images.generalize(path, partition=partition)
        windows = done.windows
        facts = {
            "path": str(done.path),
            "partition": done.partition,
            "gone": [{"what": one.what, "path": one.path, "emptied": one.emptied} for one in done.gone],
            "windows": None if windows is None else {
                "generalised": windows.generalised.value, "state": windows.state, "product": windows.product
            },
        }  # fmt: skip
        if windows is not None and (warning := windows.warning(str(path))) is not None:
            render.notice(warning)
        request.done(_told(path, done), facts, changed=done.is_changed)


def _told(path: Path, done: Generalisation) -> str:
    if done.windows is not None:
        return f"{path}: {done.windows.product or 'Windows'}, {done.windows.generalised} ({done.windows.state})"
    if not done.gone:
        return f"{path} is generalised already"
    return f"generalised {path}: {', '.join(dict.fromkeys(one.what for one in done.gone))}"
