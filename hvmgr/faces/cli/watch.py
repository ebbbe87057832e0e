"""``hvmgr watch``: what happens to VMs, a line each, until Ctrl-C."""

from __future__ import annotations

import json
import select
import sys
from typing import TYPE_CHECKING

import click

from hvmgr import units
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.watching import Happening


@click.command("watch", cls=Command, codes=READS,
               examples=["hvmgr watch", "hvmgr watch web db --since 1h", "hvmgr watch --json | jq -c .event"])  # fmt: skip
@click.argument("vms", metavar="[VM]...", type=arguments.VmName(), nargs=-1)
@click.option("--since", metavar="TIME", help="First what hvmgr did since then: 10m, 2h, 1d, or a time.")
@click.pass_obj
def command(request: Request, vms: tuple[str, ...], since: str | None) -> None:
    """Follow what happens to VMs, until Ctrl-C: snapshots, applies, exports, starts and ends, jobs.

    Without VM it follows all. What others do with virsh is there as libvirt tells it; a libvirt that is restarted is waited
    for. With --json each line is a document.
    """
    start = None if since is None else arguments.moment(since, "--since")
    with request.host() as host:
        happenings = host.watch(*vms, since=start)
        try:
            for one in happenings:
                if one is not None:
                    _show(request, one)
                elif _is_reader_gone():
                    return
        except KeyboardInterrupt:
            return  # the way in which this command ends
        finally:
            happenings.close()  # type: ignore[attr-defined]  # a generator


def _show(request: Request, one: Happening) -> None:
    if request.json:
        document = {"schema": json_out.SCHEMA, "source": one.source.value, **one.document}
        render.put(json.dumps(document, default=str) + "\n")
    elif one.vm is None:
        render.notice(one.sentence)
    else:
        columns = (units.format_local(one.time), one.vm, one.event, one.sentence)
        if render.is_terminal():
            when, vm, event, sentence = map(render.clean, columns)
            render.put(f"{when}  {vm:<16} {event:<18} {sentence}".rstrip() + "\n")
        else:
            render.put("\t".join(map(render.clean, columns)) + "\n")
    sys.stdout.flush()


def _is_reader_gone() -> bool:
    """Whether whoever read our pipe has closed it, seen without writing."""
    try:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return any(bits & (select.POLLERR | select.POLLHUP) for _, bits in poller.poll(0))
    except (OSError, ValueError):
        return False  # it has no descriptor that could be asked
