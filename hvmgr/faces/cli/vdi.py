"""``hvmgr vdi-…``: disks under Xen's word and with Xen's ``key=value`` arguments, each named by its uuid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, units
from hvmgr.faces.cli import json_out, render, streams, words
from hvmgr.faces.cli.groups import CHANGES, READS, Command
from hvmgr.faces.cli.request import Request
from hvmgr.model.image_format import ImageFormat

if TYPE_CHECKING:
    from hvmgr.operations.transfer.vdis import Vdi

_pairs = click.argument("pairs", metavar="KEY=VALUE", nargs=-1)
_progress = click.option("--progress", is_flag=True, help="Say how far it is, and how long it took, on stderr.")
_HEADERS = ("UUID", "Kind", "Name", "Size", "Takes", "VM", "Slot", "Snapshot of")
_FILTERS: Mapping[str, str] = {
    "uuid": "uuid",
    "name-label": "name",
    "snapshot-of": "snapshot_of",
    "vm-name-label": "vm",
    "vm-uuid": "vm_id",
    "slot": "slot",
    "kind": "kind",
}


@click.command("vdi-list", cls=Command, codes=READS, examples=["hvmgr vdi-list", "hvmgr vdi-list vm-name-label=web slot=vda",
                                                               "hvmgr vdi-list name-label=backup --minimal"])  # fmt: skip
@_pairs
@click.option("--minimal", is_flag=True, help="Only the uuids, with commas between them.")
@click.pass_obj
def vdi_list(request: Request, pairs: Sequence[str], *, minimal: bool) -> None:
    """List disks: of VMs, of their snapshots, snapshots of one disk alone, and free ones.

    Keys that choose among them: uuid, name-label, kind, slot, vm-name-label, vm-uuid, snapshot-of.
    """
    wanted = _read(pairs, optional=tuple(_FILTERS))
    with request.host() as host:
        found = [one for one in host.disks.list() if _fits(one, wanted)]
    if request.json:
        json_out.show({"vdis": [json_out.vdi(one) for one in found]})
    elif minimal:
        render.say(",".join(one.uuid for one in found))
    else:
        render.table(_HEADERS, [_row(one) for one in found], right=("Size", "Takes"))


@click.command(
    "vdi-create", cls=Command, codes=CHANGES, examples=["hvmgr vdi-create name-label=backup virtual-size=20GiB"]
)
@_pairs
@click.pass_obj
def vdi_create(request: Request, pairs: Sequence[str]) -> None:
    """Make a blank disk of no VM, and print its uuid.

    Keys: virtual-size (needed; bytes, or with a unit), name-label. For the sake of scripts written for Xen sr-uuid and type
    are taken too, and mean nothing: there is one place for free disks.
    """
    given = _read(pairs, needed=("virtual-size",), optional=("name-label", "sr-uuid", "type"))
    with request.host() as host, request.changing():
        made = host.disks.create(units.parse_size(given["virtual-size"]), name=given.get("name-label", ""))
        request.done(made, {"uuid": made})


@click.command("vdi-snapshot", cls=Command, codes=CHANGES, examples=["hvmgr vdi-snapshot uuid=UUID"])
@_pairs
@click.pass_obj
def vdi_snapshot(request: Request, pairs: Sequence[str]) -> None:
    """Take a snapshot of one disk alone, and print its uuid.

    Its VM may run, and does not show it in its tree. Keys: uuid (needed), name-label.
    """
    given = _read(pairs, needed=("uuid",), optional=("name-label",))
    with request.host() as host, request.changing():
        made = host.disks.snapshot(given["uuid"], name=given.get("name-label", ""))
        request.done(made, {"uuid": made})


@click.command("vdi-destroy", cls=Command, codes=CHANGES, examples=["hvmgr vdi-destroy uuid=UUID"])
@_pairs
@click.pass_obj
def vdi_destroy(request: Request, pairs: Sequence[str]) -> None:
    """Remove a free disk, or a snapshot of one disk alone.

    The snapshots of a disk stay. The disks of a VM and of its snapshots go with these. Keys: uuid (needed).
    """
    given = _read(pairs, needed=("uuid",))
    with request.host() as host, request.changing():
        request.require_consent(f"the disk {given['uuid']} goes for good")
        host.disks.destroy(given["uuid"])
        request.done(f"destroyed {given['uuid']}", {"uuid": given["uuid"]})


@click.command("vdi-export", cls=Command, codes=CHANGES, examples=["hvmgr vdi-export uuid=UUID filename=full.vhd format=vhd",
    "hvmgr vdi-export uuid=UUID base=UUID filename=delta.vhd format=vhd --progress"])  # fmt: skip
@_pairs
@_progress
@click.pass_obj
def vdi_export(request: Request, pairs: Sequence[str], *, progress: bool) -> None:
    """Write a disk into a new file: as a whole, or what changed since another point of it.

    Keys: uuid and filename (needed; an empty one, or '-', is stdout), format (raw, vhd, qcow2; without it raw), base (the uuid
    of the point that a delta starts from).
    """
    given = _read(pairs, needed=("uuid", "filename"), optional=("format", "base"))
    file = given["filename"] or streams.STANDARD
    streams.require_target(request, file)
    report = streams.Report(request, wanted=progress)
    with request.host() as host, request.changing():
        path = streams.path_of(file)
        with host.disks.export(given["uuid"], base=given.get("base"), format=_format(given), path=path) as stream:
            streams.write(request, stream, file, report)
        report.end()
        if file != streams.STANDARD:
            request.done(f"exported {stream.name} to {file} ({streams.size(stream)})", json_out.stream(stream, file))


@click.command("vdi-import", cls=Command, codes=CHANGES, examples=["hvmgr vdi-import uuid=UUID filename=full.vhd format=vhd",
                                                    "hvmgr vdi-import uuid=UUID filename=delta.vhd format=vhd"])  # fmt: skip
@_pairs
@click.option(
    "--force", is_flag=True, help="Take a delta on something else, or raw bytes that look wrong, all the same."
)
@_progress
@click.pass_obj
def vdi_import(request: Request, pairs: Sequence[str], *, force: bool, progress: bool) -> None:
    """Replace what a disk holds by a file: a whole disk, or a delta on what it holds.

    A VM whose disk it is has to be off. Keys: uuid and filename (needed; an empty one, or '-', is stdin), format (raw, vhd,
    qcow2; without it raw).
    """
    given = _read(pairs, needed=("uuid", "filename"), optional=("format",))
    uuid, fmt = given["uuid"], _format(given)
    file = given["filename"] or streams.STANDARD
    report = streams.Report(request, wanted=progress)
    with request.host() as host, request.changing(), streams.source(file) as (stream, length):
        request.require_consent(f"what the disk {uuid} holds now goes for good")
        name = "stdin" if file == streams.STANDARD else file
        host.disks.receive(uuid, stream, format=fmt, length=length, force=force, name=name)
        report.end()
        request.done(f"imported {name} into {uuid}", {"uuid": uuid, "format": fmt.value})


def _read(pairs: Sequence[str], *, needed: Sequence[str] = (), optional: Sequence[str] = ()) -> dict[str, str]:
    """The values by their keys, all of them known and none twice."""
    known, given = (*needed, *optional), dict[str, str]()
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise errors.UsageError(f"'{pair}' is no KEY=VALUE", hint=f"keys: {', '.join(known)}")
        if key not in known:
            hint = words.near(key, known) or f"keys: {', '.join(known)}"
            raise errors.UsageError(f"there is no key '{key}'", hint=hint)
        if key in given:
            raise errors.UsageError(f"{key} is given twice")
        given[key] = value
    for key in needed:
        if key not in given:
            raise errors.UsageError(f"{key}= is missing", hint=f"keys: {', '.join(known)}")
    return given


def _format(given: Mapping[str, str]) -> ImageFormat:
    text = given.get("format", "raw").lower()
    if text not in streams.FORMATS:
        raise errors.UsageError(f"'{text}' is no format of a disk here", hint=f"one of {', '.join(streams.FORMATS)}")
    return ImageFormat(text)


def _fits(one: Vdi, wanted: Mapping[str, str]) -> bool:
    return all(str(getattr(one, _FILTERS[key]) or "") == value for key, value in wanted.items())


def _row(one: Vdi) -> tuple[Any, ...]:
    sizes = (units.format_size(one.size), units.format_size(one.used))
    if not render.is_terminal():
        sizes = (str(one.size), str(one.used))
    return (one.uuid, one.kind.value, one.name, *sizes, one.vm or "-", one.slot or "-", one.snapshot_of or "-")
