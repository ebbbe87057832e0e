"""``hvmgr image``: image files, each named by its path."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, units
from hvmgr.faces.cli import arguments, attach, json_out, prepare, render
from hvmgr.faces.cli.groups import READS, Group
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.model.image_info import ImageCheck, ImageInfo, ImageOptions

_MADE = ("vhd", "vhdx", "qcow2", "raw")
_READ = (*_MADE, "vmdk", "vdi")
_CORRUPT = errors.Corrupt.exit_code
_USES = {
    "runs": "which runs",
    "off": "which is off",
    "saved": "which is saved",
    "snapshot": "which froze it",
    "undo": "where it is kept",
    "parent": "which stands on it",
    "attached": "as which it is attached",
    "unknown": "perhaps",
}


def _path(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.argument(name.lower(), metavar=name, type=click.Path(path_type=Path))


def _file_option(name: str, words: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(name, metavar=name.strip("-").upper(), type=click.Path(path_type=Path), help=words)


_search = click.option(
    "--search", "folders", multiple=True, metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
    help="Look for parents of a VHD here, too. Repeatable.",
)  # fmt: skip


def _making(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that makes an image."""
    options = (
        click.option(
            "--format", "image_format", type=click.Choice(_MADE), help="The format; without it by the suffix."
        ),
        click.option("--fixed/--dynamic", default=False, help="All space at once, or as it is needed (the default)."),
        _file_option("--parent", "Make a differencing image on this one."),
        click.option("--block-size", metavar="B", type=arguments.Size(), help="The block (qcow2: cluster) size."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group("image", cls=Group)
def command() -> None:
    """Work on image files, each named by its path: VHD, VHDX, qcow2, raw."""


@command.command("create", examples=["hvmgr image create base.vhd --size 10G",
                                     "hvmgr image create child.vhd --parent base.vhd"])  # fmt: skip
@_path("PATH")
@click.option(
    "--size", metavar="S", type=arguments.Size(), help="The size of the disk; with --parent that of the parent."
)
@_making
@click.pass_obj
def create(request: Request, /, path: Path, size: int | None, **wish: Any) -> None:
    """Make an empty image; with --parent a differencing one.

    Nothing is ever replaced, and a command that fails leaves no file.
    """
    with request.host() as host, request.changing():
        made = host.images.create(path, size, _options(wish))
        request.done(_made("created", made), {"image": _document(made)})


@command.command("info", codes=READS, examples=["hvmgr image info base.vhd", "hvmgr image info child.vhd --chain"])
@_path("PATH")
@click.option("--chain", is_flag=True, help="Also everything that it stands on.")
@_search
@click.pass_obj
def info(request: Request, /, *, path: Path, chain: bool, folders: tuple[Path, ...]) -> None:
    """Show what an image is, by its content: type, sizes, ids, its parent, and who uses it."""
    with request.host() as host:
        found = host.images.chain(path, folders=folders) if chain else [host.images.info(path, folders=folders)]
    if request.json:
        json_out.show({"image": _document(found[0]), "chain": [_document(one) for one in found] if chain else None})
    elif chain:
        for line in _drawn(found):
            render.say(line)
    else:
        render.facts(_facts(found[0]))


@command.command("check", examples=["hvmgr image check base.vhd", "hvmgr image check child.vhd --chain",
                                    "hvmgr image check base.vhd --repair"])  # fmt: skip
@_path("PATH")
@click.option("--chain", is_flag=True, help="Also everything that it stands on.")
@click.option("--repair", is_flag=True, help="Put right what needs no guess.")
@_search
@click.pass_context
def check(context: click.Context, /, *, path: Path, chain: bool, repair: bool, folders: tuple[Path, ...]) -> None:
    """Check an image by every rule of its format; the exit code is 6 when readers would refuse it.

    VHD is checked by hvmgr itself, everything else by QEMU. Nothing is written without --repair.
    """
    request: Request = context.obj
    with request.host() as host, request.changing():
        found = host.images.check(path, chain=chain, repair=repair, folders=folders)
        if request.dry_run and repair:
            request.show_plan(None)
        elif request.json:
            json_out.show(_check_document(found))
        else:
            _show_check(found)
        context.exit(0 if found.is_sound else _CORRUPT)


@command.command("convert", examples=["hvmgr image convert disk.vhd disk.qcow2",
                                      "hvmgr image convert snapshot.avhd whole.vhd --fixed",
                                      "hvmgr image convert now.qcow2 delta.vhd --parent base.vhd"])  # fmt: skip
@_path("SRC")
@_path("DST")
@_making
@click.option("--keep-id", is_flag=True, help="A VHD that is made of a VHD has the same id.")
@click.option("--source-format", type=click.Choice(_READ), help="What SRC is, where its content says something else.")
@_search
@click.pass_obj
def convert(request: Request, /, *, src: Path, dst: Path, **wish: Any) -> None:
    """Write the disk that an image shows, with all its parents, into a new image.

    The disk keeps its exact size, and zeros take no space. With --parent only what differs from that is written. SRC is
    only read; DST is never replaced, and is complete or not there at all.
    """
    with request.host() as host, request.changing():
        made = host.images.convert(src, dst, _options(wish))
        request.done(_made(f"converted {src} to", made), {"image": _document(made)})


@command.command("merge", examples=["hvmgr image merge child.vhd", "hvmgr image merge top.avhd --into base.vhd"])
@_path("CHILD")
@_file_option("--into", "Merge into this ancestor, with all between; without it into the parent.")
@click.option("--keep", is_flag=True, help="Leave the merged images where they are.")
@_search
@click.pass_obj
def merge(request: Request, /, *, child: Path, into: Path | None, keep: bool, folders: tuple[Path, ...]) -> None:
    """Merge a differencing image into its parent, which keeps its name and its id.

    What stood on the child stands on the parent afterwards. The merged images are removed. It is refused while a VM or
    another differencing image needs one of them.
    """
    with request.host() as host, request.changing():
        made = host.images.merge(child, into=into, keep=keep, folders=folders)
        request.done(f"merged {child} into {made.path}", {"image": _document(made)})


@command.command("resize", examples=["hvmgr image resize base.vhd 20G", "hvmgr image resize base.qcow2 8G --shrink"])
@_path("PATH")
@click.argument("size", metavar="SIZE", type=arguments.Size())
@click.option("--shrink", is_flag=True, help="Cut the disk off: what lies behind SIZE is lost.")
@click.pass_obj
def resize(request: Request, /, *, path: Path, size: int, shrink: bool) -> None:
    """Make a disk larger, or smaller where the format and the partitions on it allow that.

    A GPT's second copy moves to the new end of a disk that is cut. Images with children keep their size.
    """
    with request.host() as host, request.changing():
        changed = host.images.resize(path, size, shrink=shrink)
        made = host.images.info(path)
        request.done(f"{path} has {size} bytes", {"image": _document(made)}, changed=changed)


@command.command("compact", examples=["hvmgr image compact base.vhd"])
@_path("PATH")
@click.pass_obj
def compact(request: Request, path: Path) -> None:
    """Give back the space of blocks that hold nothing but zeros; the disk stays the same."""
    with request.host() as host, request.changing():
        freed = host.images.compact(path)
        made = host.images.info(path)
        sentence = f"{path} takes {units.format_size(freed)} less" if freed else f"{path} has nothing to give back"
        request.done(sentence, {"image": _document(made), "freed": freed}, changed=freed > 0)


@command.command("reparent", examples=["hvmgr image reparent child.vhd moved/base.vhd"])
@_path("CHILD")
@_path("PARENT")
@click.option("--ignore-id", is_flag=True, help="Take PARENT although nothing proves that it is the right one.")
@_search
@click.pass_obj
def reparent(request: Request, /, *, child: Path, parent: Path, ignore_id: bool, folders: tuple[Path, ...]) -> None:
    """Let a differencing image name another file as its parent.

    Where the old parent is there, both are compared byte by byte; else the id of a VHD decides.
    """
    with request.host() as host, request.changing():
        proof = host.images.reparent(child, parent, ignore_id=ignore_id, folders=folders)
        made = host.images.info(child, folders=(*folders, parent.parent))
        request.done(f"{child} stands on {parent}", {"image": _document(made), "proof": proof.value})


attach.register(command)
command.add_command(prepare.prepare)
command.add_command(prepare.generalize)


# --- what is said ---------------------------------------------------------------------------------------------------


def _format(word: str | None) -> ImageFormat | None:
    from hvmgr.model.image_format import ImageFormat

    return None if word is None else ImageFormat(word)


def _options(wish: dict[str, Any]) -> ImageOptions:
    from hvmgr.model.image_info import ImageOptions

    return ImageOptions(
        format=_format(wish["image_format"]),
        fixed=wish["fixed"],
        parent=wish["parent"],
        block_size=wish["block_size"],
        keep_id=wish.get("keep_id", False),
        source_format=_format(wish.get("source_format")),
        folders=wish.get("folders", ()),
    )


def _made(what: str, made: ImageInfo) -> str:
    return f"{what} {made.path} ({made.type} {made.format}, {units.format_size(made.size)})"


def _document(one: ImageInfo) -> json_out.Document:
    parent = one.parent
    return {
        "path": str(one.path),
        "format": one.format,
        "type": one.type.value,
        "size": one.size,
        "file_size": one.file_size,
        "taken": one.taken,
        "block_size": one.block_size,
        "creator": one.creator,
        "created": None if one.created is None else units.to_rfc3339(one.created),
        "id": one.id,
        "parent": None if parent is None else {
            "names": [{"kind": kind, "name": name} for kind, name in parent.names],
            "id": parent.id,
            "path": None if parent.path is None else str(parent.path),
            "problem": parent.problem,
        },
        "allocation": one.allocation,
        "fragmentation": one.fragmentation,
        "used_by": [{"use": user.use.value, "name": user.name, "vm": user.vm} for user in one.used_by],
        "libvirt_asked": one.libvirt_asked,
        "faults": list(one.faults),
        "open_change": one.open_change,
    }  # fmt: skip


def _facts(one: ImageInfo) -> list[tuple[str, str]]:
    size = units.format_size
    rows = [
        ("Path", str(one.path)),
        ("Format", f"{one.format}, {one.type}"),
        ("Size", f"{size(one.size)} ({one.size} bytes)"),
        ("File", f"{size(one.file_size)}, takes {size(one.taken)} on disk"),
        ("Block size", "" if one.block_size is None else size(one.block_size)),
        ("Creator", one.creator or ""),
        ("Created", "" if one.created is None else units.format_local(one.created)),
        ("Id", one.id or ""),
        ("Allocation", "" if one.allocation is None else f"{one.allocation} %"),
        ("Fragmentation", "" if one.fragmentation is None else f"{one.fragmentation} %"),
    ]
    if one.parent is not None:
        rows.append(
            ("Parent", str(one.parent.path) if one.parent.path is not None else f"not found: {one.parent.problem}")
        )
        rows.append(("Parent id", one.parent.id or ""))
        rows += [(f"Parent as {kind}", name) for kind, name in one.parent.names]
    rows += [("Used by", f"{user.name}, {_USES[user.use.value]}") for user in one.used_by]
    if not one.libvirt_asked:
        rows.append(("Note", "libvirt could not be asked who uses it"))
    rows += [("Wrong", fault) for fault in one.faults]
    rows.append(("Cut off", one.open_change or ""))
    return [row for row in rows if row[1]]


def _drawn(chain: list[ImageInfo]) -> list[str]:
    """A chain from the image that it ends with, the parents below it."""
    lines = []
    for depth, one in enumerate(chain):
        place = "" if depth == 0 else "    " * (depth - 1) + "└── "
        share = "" if one.allocation is None else f", {one.allocation} % here"
        used = [user.name for user in one.used_by if user.use.value != "parent"]
        note = f"; used by {', '.join(used)}" if used else ""
        lines.append(f"{place}{one.path} ({one.type} {one.format}, {units.format_size(one.size)}{share}){note}")
    last = chain[-1].parent
    if last is not None:
        lines.append("    " * (len(chain) - 1) + f"└── missing: {last.problem}")
    return lines


def _check_document(found: ImageCheck) -> json_out.Document:
    def faults(several: Any) -> list[json_out.Document]:
        return [
            {"path": str(one.path), "code": one.code, "severity": one.severity.value, "sentence": one.sentence,
             "offset": one.offset}
            for one in several
        ]  # fmt: skip

    return {
        "changed": bool(found.repaired),
        "path": str(found.path),
        "format": found.format,
        "sound": found.is_sound,
        "findings": faults(found.faults),
        "repaired": faults(found.repaired),
    }


def _show_check(found: ImageCheck) -> None:
    for one in found.repaired:
        render.notice(f"repaired: {one.code}: {one.sentence}")
    rows = [
        (one.severity.value, one.code, str(one.path), "" if one.offset is None else str(one.offset), one.sentence)
        for one in found.faults
    ]
    if rows:
        render.table(("", "Code", "Image", "Offset", "Found"), rows, right=("Offset",))
    if any(one.severity.value == "repairable" for one in found.faults):
        render.notice(f"put it right with: hvmgr image check {shlex.quote(os.fspath(found.path))} --repair")
    if render.is_terminal():
        render.say("the image is sound" if found.is_sound else "the image is damaged")
