"""``hvmgr vm set``: what a VM's owner wants of its snapshots, and of the VM after a crash."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, settings
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.policy import Policy

_TYPES = ("standard", "production", "production-only", "disabled")


@click.command("set", cls=Command, examples=["hvmgr vm set web --snapshot-type production",
                                             "hvmgr vm set web --automatic-snapshots on --schedule hourly --keep last=3,daily=7",
                                             "hvmgr vm set web --recovery 'revert:before the update'",
                                             "hvmgr vm set web --owner anna --tag shop --untag test"])  # fmt: skip
@arguments.vm
@click.option("--snapshot-type", type=click.Choice(_TYPES),
              help="What 'snapshot create' takes without --type; disabled: nothing.")  # fmt: skip
@click.option("--automatic-snapshots", type=click.Choice(("on", "off")),
              help="Whether hvmgr takes snapshots by itself: at a start when there is none, and by the schedule.")  # fmt: skip
@click.option("--keep", metavar="RULES",
              help="How many scheduled ones stay: 7, or last=3,hourly=24,daily=7,weekly=4; default: as hvmgr.yaml says.")  # fmt: skip
@click.option("--schedule", metavar="WHEN",
              help="hourly, daily[@HH:MM], weekly[@DAY][@HH:MM], a time between two such as 30m or 6h, or none.")  # fmt: skip
@click.option("--recovery", metavar="WHAT",
              help="After a crash: none, revert (to the snapshot above the present), or revert:SNAP.")  # fmt: skip
@click.option("--owner", metavar="NAME", help="Whom the VM belongs to.")
@click.option("--no-owner", "owner", flag_value="", help="It belongs to nobody.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="One more word to find the VM by. Repeatable.")
@click.option("--untag", "untags", multiple=True, metavar="TAG", help="A word that it is found by no more. Repeatable.")
@click.pass_obj
def command(request: Request, /, vm: str, automatic_snapshots: str | None, **words: Any) -> None:
    """Say what a VM's snapshots are, which are automatic, what follows a crash, whom it belongs to.

    What is not given stays as it is. The VM may run. An apply does not change these settings.
    """
    if automatic_snapshots is None and not any(word not in (None, ()) for word in words.values()):
        raise errors.UsageError("nothing to set", hint="see: hvmgr vm set --help")
    with request.host() as host, request.changing():
        one = host.vm(vm)
        wanted = None if automatic_snapshots is None else automatic_snapshots == "on"
        changed = one.set(automatic_snapshots=wanted, **words)
        told = one.home.facts()
        facts = {
            "vm": json_out.vm(one, request.state(one)),
            "policy": json_out.policy(told.policy),
            "owner": told.owner,
            "tags": list(told.tags),
        }
        request.done(f"set {one.name}" if changed else f"{one.name} is set so already", facts, changed=changed)
        say_what_is_missing(host.uri, one.policy)


def say_what_is_missing(uri: str, wanted: Policy) -> None:
    """A policy that nobody carries out looks like one that somebody does."""
    from hvmgr.operations import start_hook

    asks = wanted.takes_snapshots or wanted.recovery is not None
    if asks and uri == settings.SYSTEM_URI and start_hook.asked(start_hook.FOLDER) is not start_hook.Asked.US:
        render.notice("nothing tells hvmgr of starts, ends and the time on this host: hvmgr hook install")


def lines(policy: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The settings as 'vm show' has them, of the document's part."""
    if policy is None:
        yield "automatic snapshots", "not understood: set them anew with 'hvmgr vm set'"
        return
    yield "snapshot type", policy["snapshot_type"]
    keep = ",".join(f"{rule}={count}" for rule, count in policy["keep"].items() if count)
    when = "no schedule" if policy["schedule"] is None else f"{policy['schedule']}, keep {keep}"
    yield "automatic snapshots", f"on; {when}" if policy["automatic_snapshots"] else "off"
    target = policy["recovery_snapshot"]
    yield "recovery", policy["recovery"] + (f" to {target}" if target else "")
