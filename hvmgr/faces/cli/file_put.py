"""``hvmgr file put`` and ``restore``: files into the disks of a VM, and back out of a snapshot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, file_render, key_files
from hvmgr.faces.cli import file_options as options
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.inside.putting import Put
    from hvmgr.operations.vm import VM

_MODE_MAX = 0o7777


class _Mode(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4, not before
    """An octal mode."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Its number."""
        if isinstance(value, int):
            return value
        try:
            found = int(value, 8)
        except ValueError:
            found = -1
        if not 0 <= found <= _MODE_MAX:
            self.fail(f"'{value}' is no mode such as 0644", param, ctx)
        return found


_PLACE = (
    click.option("--disk", "slot", metavar="SLOT", help="On this disk."),
    click.option("--partition", metavar="N|GROUP/VOLUME", help="On this partition, or logical volume."),
    key_files.option,
    click.option("--overwrite", is_flag=True, help="Files that are there already are replaced."),
    click.option("--parents", is_flag=True, help="Folders that are missing on the way are made."),
    click.option("--name", metavar="NAME", help="The name of the snapshot that is taken first."),
)


def _placed(function: Any) -> Any:
    for option in reversed(_PLACE):
        function = option(function)
    return function


@click.command(
    "put",
    cls=Command,
    examples=[
        "hvmgr file put web hosts /etc/hosts --overwrite",
        "hvmgr file put web id.pub /home/anna/.ssh/authorized_keys --owner anna --mode 0600 --parents",
        "hvmgr file put win drivers/ /Drivers --partition 2",
    ],
)
@click.argument("vm", type=arguments.VmName())
@click.argument("words", metavar="SRC... DEST", nargs=-1)
@_placed
@click.option("--owner", metavar="USER[:GROUP]", help="Who they belong to, by number or by the guest's own names.")
@click.option(
    "--mode", metavar="OCTAL", type=_Mode(), help="The mode of files; folders can be entered by whoever reads."
)
@click.pass_obj
def put(
    request: Request, /, vm: str, words: tuple[str, ...], *, owner: str | None, mode: int | None, **given: Any
) -> None:
    """Put files and folders of this host into a file system of a VM that is off.

    A snapshot is taken first: 'hvmgr snapshot revert VM' is the way back. Needs neither root nor a mount. DEST is a folder that
    is there, or the new path of the only SRC. On any failure nothing is changed.
    """
    if len(words) < 2:
        raise errors.UsageError("put needs files and where they go", hint="hvmgr file put VM SRC... DEST")
    if not words[-1]:
        raise errors.UsageError("where the files go is empty", hint="the topmost folder is /")
    from hvmgr.model.put_options import PutOptions

    manner = PutOptions(overwrite=given["overwrite"], parents=given["parents"], mode=mode)
    keys = key_files.read(given["key_files"])
    with request.host() as host, request.changing():
        one = host.vm(vm)
        done = one.put_files(
            [Path(word) for word in words[:-1]], os.fsencode(words[-1]), manner,
            slot=given["slot"], partition=given["partition"], owner=owner, name=given["name"], keys=keys,
        )  # fmt: skip
        _done(request, one, done)


@click.command(
    "restore",
    cls=Command,
    examples=[
        "hvmgr file restore web before /etc/passwd --overwrite",
        "hvmgr file restore web before '/srv/data/*.db' --into /srv/old",
        "hvmgr file restore web before /etc/nginx --to running --overwrite",
    ],
)
@click.argument("vm", type=arguments.VmName())
@click.argument("snapshot", metavar="SNAP", type=arguments.SnapshotName())
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--to", type=click.Choice(("disk", "running")), default="disk",
              help="Into the disk of a VM that is off (disk), or by its agent into the guest that runs.")  # fmt: skip
@click.option("--into", metavar="DIR", help="The folder in the guest that gets them; else they go where they were.")
@_placed
@click.pass_obj
def restore(
    request: Request, /, vm: str, snapshot: str, paths: tuple[str, ...], *, to: str, into: str | None, **given: Any
) -> None:
    """Bring files and folders of a snapshot back into the present of the VM.

    With the owners, modes and times that they had. A VM that is off is snapshotted first, as for 'file put'. With --to running
    the guest's agent writes each file beside its place, compares it, and renames it.
    """
    from hvmgr.model.put_options import FilesWanted, PutOptions

    folder = None if into is None else os.fsencode(into)
    wanted = FilesWanted(snapshot, [os.fsencode(one) for one in paths], given["slot"], given["partition"], folder)
    if to == "running" and (given["parents"] or given["name"] is not None):
        raise errors.UsageError("--parents and --name are for a VM that is off", hint="leave them out")
    keys = key_files.read(given["key_files"])
    with request.host() as host, request.changing():
        one = host.vm(vm)
        if to == "running":
            done = one.restore_into_guest(wanted, overwrite=given["overwrite"], keys=keys)
        else:
            manner = PutOptions(overwrite=given["overwrite"], parents=given["parents"])
            done = one.restore_files(wanted, manner, name=given["name"], keys=keys)
        _done(request, one, done)


def _done(request: Request, vm: VM, done: Put) -> None:
    options.tell_left_out(done.left_out)
    taken = None if done.snapshot is None else vm.snapshot(done.snapshot)
    before = "" if taken is None else f"; what was before is the snapshot '{taken.name}'"
    where = os.fsdecode(done.folder)
    request.done(
        f"{file_render.counted(done.files, done.size)} put into {where} of {done.volume}, by {done.engine}{before}"
        if done.files
        else "nothing to do",
        {
            "vm": vm.name,
            "to": file_render.name_of(done.folder),
            "volume": done.volume,
            "engine": done.engine,
            "files": done.files,
            "replaced": done.replaced,
            "size": done.size,
            "snapshot": None if taken is None else {"id": taken.id, "name": taken.name},
            "left_out": done.left_out,
        },
        changed=bool(done.files),
    )
