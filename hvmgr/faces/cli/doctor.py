"""``hvmgr doctor``: what is wrong, and what puts it right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request
from hvmgr.model import diagnosis
from hvmgr.model.finding import Finding

if TYPE_CHECKING:
    from hvmgr.operations.doctor.repair import Repaired

_HEADERS = ("", "Code", "VM", "Found", "What puts it right")
_REPAIRED = ("", "Code", "VM", "Done", "Failed because")
_CODES = (0, 1, 2, 3, 4, 5, 6, 8, 130)


@click.command("doctor", cls=Command, codes=_CODES, examples=["hvmgr doctor", "hvmgr doctor web --thorough",
                                                              "hvmgr doctor --repair --dry-run",
                                                              "hvmgr doctor web --repair"])  # fmt: skip
@click.argument("vm", required=False, type=arguments.VmName(), metavar="[VM]")
@click.option("--repair", is_flag=True, help="Put right what is safe to put right; nothing is ever deleted.")
@click.option("--accept-touched", is_flag=True,
              help="With --repair: frozen images whose time alone differs are as they should be.")  # fmt: skip
@click.option("--accept-present", is_flag=True,
              help="With --repair and a VM: its disks are as they should be, although others changed their chains.")  # fmt: skip
@click.option("--thorough", is_flag=True, help="Read the tables of every image too (qemu-img check); takes time.")
@click.pass_context
def command(
    context: click.Context,
    /,
    vm: str | None,
    *,
    repair: bool,
    accept_touched: bool,
    accept_present: bool,
    thorough: bool,
) -> None:
    """Say what is wrong with this host and its VMs, and put it right.

    VM is a name, an id, or the path of a home; without it, the host and every home are examined. The exit code is 0 when
    no error is left, else that of the worst one: damage before conflicts.
    """
    request: Request = context.obj
    for given, option in ((accept_touched, "--accept-touched"), (accept_present, "--accept-present")):
        if given and not repair:
            raise errors.UsageError(f"{option} goes with --repair", hint="add --repair")
    if accept_present and vm is None:
        raise errors.UsageError("--accept-present needs the VM that is meant", hint="look at its disks first")
    done: list[Repaired] = []
    with request.host() as host:
        if repair:
            done = host.repair(
                vm,
                accept_touched=accept_touched,
                accept_present=accept_present,
                thorough=thorough,
                change_host=lambda sentence: _may_change_host(request, sentence),
            )
        found = host.doctor(vm, thorough=thorough)
    changed = any(one.failure is None for one in done) and not request.dry_run
    if request.json:
        documents = {"findings": [*map(json_out.finding, found)], "repaired": [*map(json_out.repaired, done)]}
        json_out.show({"changed": changed, **documents})
    else:
        _show(found, done, would=request.dry_run)
    context.exit(0 if request.dry_run and repair else diagnosis.exit_code(found))


def _may_change_host(request: Request, sentence: str) -> bool:
    """A setting of the host is changed only for somebody who says so; others go on without it."""
    try:
        request.require_consent(f"doctor would {sentence}", always=True)
    except (errors.Declined, errors.UsageError):
        return False
    return True


def _show(found: Sequence[Finding], done: Sequence[Repaired], *, would: bool) -> None:
    """What was repaired, then what is left; a terminal gets tables and a sentence at the end."""
    if done:
        render.table(_REPAIRED, [_repaired_row(one, would=would) for one in done])
    if found:
        render.table(_HEADERS, [_row(one) for one in found])
    if render.is_terminal():
        render.say(_summary(found))


def _row(one: Finding) -> tuple[str, ...]:
    cells = (one.severity.value, str(one.code), one.vm or "", one.sentence, one.repair or "")
    return cells if render.is_terminal() else (*cells[:3], one.where, *cells[3:])


def _repaired_row(one: Repaired, *, would: bool) -> tuple[str, ...]:
    what = "would" if would else "done" if one.failure is None else "failed"
    failure = " ".join(words for words in (one.failure, one.hint) if words)
    cells = (what, str(one.finding.code), one.finding.vm or "", one.done, failure)
    return cells if render.is_terminal() else (*cells[:3], one.finding.where, *cells[3:])


def _summary(found: Sequence[Finding]) -> str:
    counts = {name: sum(one.severity.value == name for one in found) for name in ("error", "warning")}
    words = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count]
    return " and ".join(words) if words else "nothing is wrong"
