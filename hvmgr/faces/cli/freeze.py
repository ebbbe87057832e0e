"""``hvmgr freeze``: a command of the host's own runs while guests stand still."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, json_out
from hvmgr.faces.cli.groups import Command, Seconds
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.standstill import Outcome

_COMMAND = "hvmgr.freeze"
_SEPARATOR = "--"
_STDERR = 2


class _BeforeCommand(Command):
    """What comes after two dashes is another program's command line, and none of ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, found, command = args, False, list[str]()
        if _SEPARATOR in args:
            place = args.index(_SEPARATOR)
            own, found, command = args[:place], True, args[place + 1 :]
        if not command and not ctx.resilient_parsing and "--help" not in own:
            what = "nothing comes after --" if found else "no command is given"
            raise errors.UsageError(f"freeze: {what}", hint="give it after two dashes: hvmgr freeze VM… -- COMMAND")
        ctx.meta[_COMMAND] = command
        return super().parse_args(ctx, own)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), _SEPARATOR, "COMMAND..."]


@click.command(
    "freeze",
    cls=_BeforeCommand,
    examples=[
        "hvmgr freeze web -- lvcreate --snapshot --name web-now --size 10G vg/vms",
        "hvmgr freeze web db --limit 20 -- btrfs subvolume snapshot -r /var/lib/hvmgr /srv/snaps/now",
    ],
)
@click.argument("vms", metavar="VM...", nargs=-1, required=True, type=arguments.VmName())
@click.option("--limit", "limit_s", metavar="S", type=Seconds(), default=60.0, show_default=True,
              help="How long the guests may stand still, in seconds; the command is stopped then.")  # fmt: skip
@click.pass_context
def command(context: click.Context, vms: tuple[str, ...], *, limit_s: float) -> None:
    """Run a command of the host's own while the guests' file systems are at rest.

    For a snapshot by LVM, Btrfs, ZFS, XFS or a storage box: their agents put the file systems of all these guests to
    rest, COMMAND runs, without a shell, and they are woken whatever becomes of it. A VM that is off is kept from starting.
    """
    request: Request = context.obj
    argv: list[str] = context.meta[_COMMAND]
    with request.host() as host, request.changing():
        named = list({one.id: one for one in map(host.vm, vms)}.values())
        with contextlib.ExitStack() as stack:
            for one in named:
                stack.enter_context(request.seconded(one))
            stdout = _STDERR if request.json else None  # stdout is for the document alone
            sys.stdout.flush()
            outcome = host.freeze(named, argv, limit_s=limit_s, stdout=stdout)
        request.done(_sentence(outcome, argv), _document(outcome, argv))


def _sentence(outcome: Outcome, argv: list[str]) -> str:
    frozen = [one.name for one in outcome.vms if one.file_systems is not None]
    off = [one.name for one in outcome.vms if one.file_systems is None]
    stood = f"{', '.join(frozen)} stood still for {outcome.seconds:.1f} s" if frozen else "nothing had to stand still"
    kept = f"; {', '.join(off)} {'is' if len(off) == 1 else 'are'} off and could not start meanwhile" if off else ""
    return f"'{shlex.join(argv)}' ended well: {stood}{kept}"


def _document(outcome: Outcome, argv: list[str]) -> json_out.Document:
    vms: list[dict[str, Any]] = [
        {"id": one.id, "name": one.name, "state": one.state.value, "file_systems": one.file_systems}
        for one in outcome.vms
    ]
    return {"command": argv, "exit_code": outcome.exit_code, "seconds": round(outcome.seconds, 3), "vms": vms}
