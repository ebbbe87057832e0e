"""``hvmgr vm release``: a VM becomes a plain domain of libvirt's again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr.faces.cli import arguments
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.adopt.release import Release


@click.command("release", cls=Command, examples=["hvmgr vm release web", "hvmgr vm release web --flatten",
                                                 "hvmgr vm release web --dry-run"])  # fmt: skip
@arguments.vm
@click.option("--flatten", is_flag=True, help="Make the present one complete image per disk, with no snapshots.")
@click.pass_obj
def command(request: Request, vm: str, *, flatten: bool) -> None:
    """Make a VM a plain domain of libvirt's again, which hvmgr knows nothing of.

    The VM may run; its images stay where they are. The snapshots between the root of the tree and the present become
    external snapshots of libvirt's. What libvirt has no words for is said before, and asked for on a terminal; of all that
    holds data nothing is removed, and what stays in the folder without a use is listed.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        facts = {"id": one.id, "name": one.name, "home": str(one.path)}
        foreseen = one.foresee_release(flatten=flatten)
        if foreseen.lost:
            request.announce(
                f"{one.name} becomes a plain domain of libvirt's, which has no words for this", foreseen.lost
            )
        made = one.release(flatten=flatten)
        request.done(_sentence(facts["name"], made) + _way_back(facts), _document(facts, made))


def _sentence(name: str, made: Release) -> str:
    count = len(made.snapshots)
    told = f"released {name}" + (f"; libvirt has {count} snapshot{'' if count == 1 else 's'} of it" if count else "")
    return told + "".join(f"; left {path} ({what})" for path, what in made.left)


def _way_back(facts: dict[str, str]) -> str:
    """A folder that still holds disks is no place for a new home."""
    if not Path(facts["home"]).exists():
        return ""
    name = shlex.quote(facts["name"])
    return f"; its files stay in {facts['home']}, and to take it back: hvmgr vm adopt {name} --home FOLDER"


def _document(facts: dict[str, str], made: Release) -> dict[str, Any]:
    return {
        "released": facts,
        "snapshots": [{"name": name, "libvirt_name": libvirt_name} for name, libvirt_name in made.snapshots],
        "lost": list(made.lost),
        "left": [{"path": path, "what": what} for path, what in made.left],
    }
