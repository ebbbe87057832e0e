"""``hvmgr hook``: the script by which libvirt asks hvmgr before it starts a VM, and tells it of starts and ends."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, render
from hvmgr.faces.cli.groups import Group
from hvmgr.faces.cli.request import Request
from hvmgr.model.plan import Plan

_FOLDER = "/etc/libvirt/hooks"
_RESTART = (
    "libvirt looks for hooks once, when its daemon starts: restart it (systemctl restart libvirtd, or virtqemud; "
    "VMs run on)"
)

_dir = click.option("--dir", "folder", type=click.Path(path_type=Path), default=_FOLDER, metavar="DIR",
                    show_default=_FOLDER, help="libvirt's folder of hooks.")  # fmt: skip


@click.group("hook", cls=Group)
def command() -> None:
    """Let libvirt ask hvmgr before it starts a VM."""


@command.command("install", examples=["hvmgr hook install"])
@_dir
@click.pass_obj
def install(request: Request, folder: Path) -> None:
    """Install the hook: a VM whose home is half-way, or whose images are damaged, does not start.

    libvirt shows one line with the reason and what to do. Other VMs, and other hooks, are not touched. With systemd, units
    are installed and enabled that start 'hvmgr automatic run' when the hook tells of a start or an end, and every 5 minutes.
    """
    from hvmgr.operations import start_hook
    from hvmgr.operations.automatic import systemd

    done = start_hook.install(folder.absolute(), dry_run=request.dry_run)
    # Another folder is that of another libvirt than the host's: systemd is left alone.
    units = systemd.install(dry_run=request.dry_run) if folder == Path(_FOLDER) else systemd.Units()
    changed = done.changed or units.changed
    facts = {
        "hook": str(done.path),
        "installed": True,
        "restart": done.changed and done.alone,
        "worker": units.present,
    }
    if request.dry_run:
        _show(request, f"installation of {done.path}", changed=changed)
        return
    request.done(f"installed {done.path}" if changed else f"{done.path} is there already", facts, changed=changed)
    if done.changed and done.alone:
        render.notice(_RESTART)
    if folder == Path(_FOLDER) and not units.present:
        render.notice(f"no systemd: let cron do what hvmgr does by itself, for example with {systemd.cron_line()}")


@command.command("uninstall", examples=["hvmgr hook uninstall"])
@_dir
@click.pass_obj
def uninstall(request: Request, folder: Path) -> None:
    """Remove the hook and its units; libvirt starts VMs without asking hvmgr, which does nothing by itself any more."""
    from hvmgr.operations import start_hook
    from hvmgr.operations.automatic import systemd

    units = systemd.uninstall(dry_run=request.dry_run) if folder == Path(_FOLDER) else systemd.Units()
    done = start_hook.uninstall(folder.absolute(), dry_run=request.dry_run)
    changed = done.changed or units.changed
    facts = {"hook": str(done.path), "installed": False, "restart": False, "worker": False}
    if request.dry_run:
        _show(request, f"removal of {done.path}", changed=changed)
        return
    request.done(f"removed {done.path}" if changed else f"there is no {done.path}", facts, changed=changed)


@command.command("allow", examples=["hvmgr hook allow web --once"])
@arguments.vm
@click.option("--once", is_flag=True, help="The next start only; has to be given.")
@click.pass_obj
def allow(request: Request, vm: str, *, once: bool) -> None:
    """Let a VM start once, whatever the hook would find: the guest may lose data.

    The next start uses it up, also one that fails for another reason.
    """
    from hvmgr.operations import start_hook

    if not once:
        raise errors.UsageError("only one start at a time can be allowed", hint="say so: --once")
    with request.host() as host:
        one = host.vm(vm)
        found = start_hook.in_the_way(one.home)
        lines = [finding.sentence for finding in found]
        if lines:
            request.require_consent(f"{one.name} will start although it must not", lines)
        facts: dict[str, Any] = {
            "vm": {"id": one.id, "name": one.name, "home": str(one.path)},
            "ignored": [
                {"code": finding.code, "sentence": finding.sentence, "where": finding.where} for finding in found
            ],
        }
        if request.dry_run:
            _show(request, f"permission for the next start of {one.name}", changed=True)
            return
        start_hook.allow_once(one.home, wait_s=request.wait_s)
        request.done(f"the next start of {one.name} passes whatever is found", facts)


def _show(request: Request, subject: str, *, changed: bool) -> None:
    """One act, as a dry run shows it."""
    one = Plan(plan_id=str(uuid.uuid4()), vm_id="", operation="hook", subject=subject)
    request.show_plan(one if changed else None)
