"""``hvmgr vm adopt``: VMs that libvirt has already get a home."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.plan import Plan
    from hvmgr.operations.adopt.adoption import AdoptOptions
    from hvmgr.operations.host import Host
    from hvmgr.operations.vm import VM


@click.command("adopt", cls=Command, examples=["hvmgr vm adopt web db",
                                               "hvmgr vm adopt --all --dry-run",
                                               "hvmgr vm adopt web --exclude-disk vdb --home /srv/web-home"])  # fmt: skip
@click.argument("names", metavar="NAME...", nargs=-1, type=arguments.LibvirtName())
@click.option("--all", "every", is_flag=True, help="Every VM of libvirt's that hvmgr does not manage.")
@click.option("--home", type=arguments.HERE_PATH, metavar="DIR",
              help="The VM's folder, if not one named after it below the root; for one NAME.")  # fmt: skip
@click.option("--exclude-disk", "exclude_disks", multiple=True, metavar="SLOT",
              help="Leave this disk out of all snapshots. Repeatable.")  # fmt: skip
@click.option("--convert-internal", is_flag=True, help="Make an image of each snapshot inside the disks' images.")
@click.option("--drop-internal", is_flag=True,
              help="Remove the snapshots inside the disks' images; needs --yes where nobody can be asked.")  # fmt: skip
@click.pass_obj
def command(
    request: Request,
    names: tuple[str, ...],
    home: Path | None,
    exclude_disks: tuple[str, ...],
    *,
    every: bool,
    convert_internal: bool,
    drop_internal: bool,
) -> None:
    """Make hvmgr manage VMs that libvirt has already.

    The disks stay where they are, nothing that the guest sees changes, and the VM may run. External snapshots of libvirt's
    become snapshots of hvmgr's. Of several VMs those that can be adopted are; the exit code is that of the first refusal.
    """
    if every == bool(names):
        raise errors.UsageError("name the VMs to adopt, or give --all, not both", hint="see: hvmgr vm adopt --help")
    if home is not None and len(names) != 1:
        raise errors.UsageError("--home is the folder of one VM", hint="use --root for several")
    if convert_internal and drop_internal:
        raise errors.UsageError("--convert-internal and --drop-internal exclude each other", hint="give one of them")
    from hvmgr.model.adoptee import Internal
    from hvmgr.operations.adopt.adoption import AdoptOptions

    options = AdoptOptions(
        home=home,
        exclude_disks=tuple(dict.fromkeys(exclude_disks)),
        internal=Internal.CONVERT if convert_internal else Internal.DROP if drop_internal else Internal.REFUSE,
    )
    with request.host() as host, request.changing():
        names = tuple(dict.fromkeys(names)) or tuple(host.adoptable())
        if drop_internal:
            _require_loss(request, host, names)
        if len(names) == 1 and not every:
            one = host.adopt(names[0], options)
            request.done(_sentence(one), _facts(request, _Outcome([one])))
            return
        _adopt_several(request, host, names, options)


def _require_loss(request: Request, host: Host, names: tuple[str, ...]) -> None:
    """Snapshots inside images go for good; what cannot be looked at is not asked about: it is refused afterwards."""
    lost = []
    for name in names:
        with contextlib.suppress(errors.HvmgrError):
            lost += [f"{name}: {snapshot}" for snapshot in host.internal_snapshots(name)]
    if lost:
        request.require_consent("these internal snapshots will be removed", lost, always=True)


@dataclass(slots=True)
class _Outcome:
    """What became of several VMs; ``plans`` in a dry run only."""

    adopted: list[VM] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    refused: list[tuple[str, errors.HvmgrError]] = field(default_factory=list)


def _adopt_several(request: Request, host: Host, names: tuple[str, ...], options: AdoptOptions) -> None:
    outcome = _Outcome()
    for name in names:
        try:
            _adopt_one(request, host, name, options, outcome)
        except (errors.Cancelled, errors.OutcomeUnknown):
            raise
        except errors.HvmgrError as error:
            outcome.refused.append((name, error))
            if not request.json:
                render.complain(error.message, error.hint)
    if request.json:
        json_out.show(_dry_document(outcome) if request.dry_run else _full_document(request, outcome))
    elif not names:
        render.say("nothing to do")
    if outcome.refused:
        raise click.exceptions.Exit(outcome.refused[0][1].exit_code)


def _adopt_one(request: Request, host: Host, name: str, options: AdoptOptions, outcome: _Outcome) -> None:
    if request.dry_run:
        plan = request.planned(lambda: host.adopt(name, options))
        assert plan is not None, "a dry run never comes to its end"
        outcome.plans.append(plan)
        if not request.json:
            request.show_plan(plan)
        return
    outcome.adopted.append(host.adopt(name, options))
    if not request.json:
        render.say(_sentence(outcome.adopted[-1]))


def _full_document(request: Request, outcome: _Outcome) -> dict[str, Any]:
    return {"changed": bool(outcome.adopted), **_facts(request, outcome)}


def _facts(request: Request, outcome: _Outcome) -> dict[str, Any]:
    adopted = [json_out.vm(one, request.state(one)) for one in outcome.adopted]
    return {"adopted": adopted, "refused": _refusals(outcome)}


def _dry_document(outcome: _Outcome) -> dict[str, Any]:
    return {"plans": [plan.to_json() for plan in outcome.plans], "refused": _refusals(outcome)}


def _refusals(outcome: _Outcome) -> list[dict[str, Any]]:
    return [{"name": name, "error": json_out.failure(error)} for name, error in outcome.refused]


def _sentence(one: VM) -> str:
    count = len(one.snapshots())
    more = "" if count == 0 else f", with {count} snapshot{'' if count == 1 else 's'}"
    return f"adopted {one.name}; its home is {one.path}{more}"
