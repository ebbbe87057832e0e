"""``hvmgr demo``: a guided tour with a real guest."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING

import click

from hvmgr import errors
from hvmgr.faces.cli import json_out
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.faces.witness import Kind

# Kind of line → what stands in front of it, and how a terminal shows it.
_LOOKS: dict[str, tuple[str, dict[str, bool | str]]] = {
    "part": ("\n", {"bold": True, "underline": True}),
    "title": ("\n", {"bold": True}),
    "command": ("   $ ", {"fg": "cyan"}),
    "fact": ("   ", {}),
    "tree": ("       ", {}),
    "proof": ("   proof: ", {"fg": "green"}),
}


@click.command(
    "demo",
    cls=Command,
    codes=(0, 1, 2, 5, 7, 8, 130),
    examples=["hvmgr demo", "hvmgr demo --keep", "hvmgr -c qemu:///session demo"],
)
@click.option("--keep", is_flag=True, help="Leave the demo's VMs in their folder, and say how to go on with them.")
@click.pass_obj
def command(request: Request, *, keep: bool) -> None:
    """Show snapshot trees at work, with a real guest.

    In a temporary folder and with a libvirt of its own: two VMs, one on a qcow2 image and one on a dynamic VHD, with a
    Linux guest that counts in its memory and on its disks. Snapshots are taken, branched, applied and deleted; after each
    step the tree is shown, and what came back is proved from the guest's memory and from the bytes of its disks. Nothing
    of yours is touched and nothing is left behind. A proof that fails ends it with exit code 1.

    With -c the VMs live on that connection in place of a libvirt of the demo's own: for a while it has the VMs
    hvmgr-demo-web and hvmgr-demo-old, whose files are all in the temporary folder.

    The first time, 30 MB of Debian packages are downloaded for the guest. It takes a minute or two, without KVM too.
    """
    from hvmgr.faces import demo

    if request.dry_run or request.root is not None:
        raise errors.UsageError(
            "the demo has a root of its own and changes nothing of yours", hint="leave --root and --dry-run out"
        )
    started = time.monotonic()
    proofs = demo.run(_be_silent if request.json else _say, keep=keep, uri=request.uri)
    seconds = time.monotonic() - started
    if request.json:
        json_out.show({"changed": False, "proofs": proofs, "seconds": round(seconds, 1)})
    else:
        click.echo(f"\ndemo: every proof held ({len(proofs)} of {len(proofs)}), in {seconds:.0f} s")


def _say(kind: Kind, text: str) -> None:
    front, style = _LOOKS[kind]
    if front == "\n":
        click.echo()
        click.secho(text, **style)  # type: ignore[arg-type]
        return
    for line in textwrap.indent(text, front).splitlines():
        click.secho(line, **style)  # type: ignore[arg-type]


def _be_silent(_kind: Kind, _text: str) -> None:
    """Only the document is said."""
