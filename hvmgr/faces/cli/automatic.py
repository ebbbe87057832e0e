"""``hvmgr automatic``: what hvmgr does with VMs by itself; systemd or cron call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hvmgr.faces.cli import json_out, render
from hvmgr.faces.cli.groups import Group
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr import errors
    from hvmgr.model.plan import Plan
    from hvmgr.operations.automatic.worker import Deed, Outcome


@click.group("automatic", cls=Group)
def command() -> None:
    """Do what hvmgr does with VMs by itself."""


@command.command("run", examples=["hvmgr automatic run", "hvmgr automatic run --dry-run"])
@click.pass_obj
def run(request: Request) -> None:
    """Take the automatic snapshots that are due, remove those that are too many, merge, put back VMs that crashed.

    For all VMs of this host; with -c or --root for those of one connection or below one root. The units that 'hvmgr hook
    install' enables call it, and it does no harm at any time. A VM that is busy is left for the next run.
    """
    from hvmgr.operations.automatic import worker
    from hvmgr.operations.reporter import Reporter

    plans: list[Plan] = []

    def approve(plan: Plan) -> bool:
        if request.dry_run:
            plans.append(plan)
            if not request.json:
                request.show_plan(plan)
        return not request.dry_run

    def tell(deed: Deed) -> None:
        if not request.json:
            render.say(deed.sentence)

    root = None if request.root is None else request.root.resolve()
    outcome = worker.run(
        Reporter(notice=render.notice, approve=approve, dry_run=request.dry_run),
        scope=worker.Scope(request.uri, root),
        wait_s=request.wait_s,
        on_deed=tell,
    )
    _show(request, outcome, plans)
    if outcome.failed:
        raise click.exceptions.Exit(outcome.failed[0][1].exit_code)


def _show(request: Request, outcome: Outcome, plans: list[Plan]) -> None:
    """What is not told yet."""
    if request.json:
        changes = {"plans": [plan.to_json() for plan in plans]} if request.dry_run else _done(outcome.done)
        json_out.show({**changes, "put_off": _named(outcome.put_off), "failed": _named(outcome.failed)})
        return
    for name, error in outcome.put_off:
        render.notice(f"{name} is left for the next run: {error.message}")
    for name, error in outcome.failed:
        render.complain(f"{name}: {error.message}", error.hint)
    if not (outcome.done or plans or outcome.put_off or outcome.failed):
        render.say("nothing to do")


def _done(deeds: list[Deed]) -> dict[str, Any]:
    shown = [
        {
            "vm": {"id": one.vm_id, "name": one.name},
            "action": one.action.value,
            "snapshots": list(one.snapshots),
            "sentence": one.sentence,
        }
        for one in deeds
    ]
    return {"changed": bool(deeds), "done": shown}


def _named(several: list[tuple[str, errors.HvmgrError]]) -> list[dict[str, Any]]:
    return [{"name": name, "error": json_out.failure(error)} for name, error in several]
