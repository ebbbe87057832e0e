"""``hvmgr vm clone`` and ``vm move``: another VM like this one, and this one in another place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hvmgr.faces.cli import arguments, json_out
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request


@click.command("clone", cls=Command, examples=["hvmgr vm clone web web2",
                                               "hvmgr vm clone web test --snapshot 'before the update'",
                                               "hvmgr vm clone gold web7 --snapshot ready --linked"])  # fmt: skip
@arguments.vm
@click.argument("name", metavar="NEW")
@click.option("--snapshot", metavar="SNAP", help="Clone the VM as it was at a snapshot, without any of its own.")
@click.option("--linked", is_flag=True, help="Share the snapshot's images; nothing of the disks is copied.")
@click.option("--without-snapshots", is_flag=True, help="Leave the snapshots out.")
@click.option("--without-state", is_flag=True, help="Leave saved states out.")
@click.option("--keep-mac", is_flag=True, help="The addresses of the cards stay.")
@click.option("--network", "networks", multiple=True, metavar="OLD=NEW", help="Another network. Repeatable.")
@click.option("--vm-path", type=arguments.HERE_PATH, metavar="D", help="The folder that the home is made in.")
@click.option("--owner", metavar="NAME", help="Whom the VM belongs to.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A word to find the VM by. Repeatable.")
@click.pass_obj
def clone(request: Request, /, vm: str, name: str, **options: Any) -> None:
    """Make another VM like this one, with ids and addresses of its own.

    The VM has to be off or saved, or a snapshot of it is named. A clone of a snapshot with saved memory goes on from there
    at its first start.
    """
    from hvmgr.model import maps
    from hvmgr.operations.exchange.importing import CloneOptions

    options["keep_macs"] = options.pop("keep_mac")
    options["networks"] = maps.to_mapping(maps.parse("network", options["networks"]))
    with request.host() as host, request.changing():
        made = host.vm(vm).clone(name, CloneOptions(**options))
        request.done(f"made {made.name} in {made.path}", {"vm": json_out.vm(made, request.state(made))})


@click.command("move", cls=Command, examples=["hvmgr vm move web /srv/fast/web"])
@arguments.vm
@click.argument("folder", metavar="DIR", type=arguments.HERE_PATH)
@click.pass_obj
def move(request: Request, vm: str, folder: Path) -> None:
    """Give a VM that is off or saved another home.

    DIR is the new home, or, when it is there already, the folder that it is made in under its old name. The files are
    copied, the VM is switched over, and the old ones are removed.
    """
    with request.host() as host, request.changing():
        made = host.vm(vm).move(folder)
        request.done(f"moved {made.name} to {made.path}", {"vm": json_out.vm(made, request.state(made))})
