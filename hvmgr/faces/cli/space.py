"""``hvmgr space``: what VMs take on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from hvmgr import units
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.usage import Usage

_HEADERS = ("VM", "Of", "Name", "Images", "Memory")


@click.command("space", cls=Command, codes=READS, examples=["hvmgr space", "hvmgr space web"])
@click.argument("vm", required=False, type=arguments.VmName(), metavar="[VM]")
@click.pass_obj
def command(request: Request, vm: str | None) -> None:
    """Show what VMs take on disk, and what would give it back.

    Each image counts once, for the oldest snapshot that names it. Unnamed images are kept for others; those that are
    pending wait for 'snapshot merge'. Orphans are files in the home that nothing uses. Reclaimable is what merging, an
    empty undo slot and no orphans would give back, at most. By name: images that others made, which 'snapshot merge
    --image PATH' would merge and remove. Outside are images that are used but lie elsewhere.
    """
    with request.host() as host:
        found = [host.vm(vm)] if vm is not None else host.vms()
        measured = [(one, one.usage(), one.tree()) for one in found]
    if request.json:
        json_out.show({"vms": [json_out.space(*each) for each in measured]})
        return
    rows = [(one.name, *cells) for one, usage, _ in measured for cells in _rows(usage)]
    render.table(_HEADERS, rows, right=("Images", "Memory"))


def _rows(usage: Usage) -> Iterator[tuple[str, str, str, str]]:
    size = units.format_size
    for one in usage.snapshots:
        yield "snapshot", one.name, size(one.images), size(one.memory)
    for what in ("now", "undo", "unnamed", "pending"):
        yield what, "", size(getattr(usage, what)), ""
    for path, taken in usage.orphans:
        yield "orphan", path, size(taken), ""
    for path, taken in usage.by_name:
        yield "by name", path, size(taken), ""
    yield "outside", "", size(usage.outside), ""
    yield "total", "", size(usage.total), ""
    yield "reclaimable", "", size(usage.reclaimable), ""
