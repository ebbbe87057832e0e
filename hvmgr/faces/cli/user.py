"""``hvmgr user``: who may use the HTTP server."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

import click

from hvmgr import errors, settings
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Group
from hvmgr.faces.cli.request import Request
from hvmgr.model import user as model
from hvmgr.model.plan import Plan
from hvmgr.model.user import Role
from hvmgr.storage import users as storage

_users = click.option("--users", type=click.Path(path_type=Path), metavar="FILE", help="The file of users.")


@click.group("user", cls=Group)
def command() -> None:
    """Say who may use the HTTP server, and what they may do."""


@command.command(
    "add", examples=["hvmgr user add backup --role read", "pass show hvmgr/anna | hvmgr user add anna --role admin"]
)
@click.argument("name", metavar="NAME")
@click.option("--role", type=click.Choice([role.value for role in Role]), default=Role.READ.value, show_default=True,
              help="read: look and export; admin: everything.")  # fmt: skip
@click.option("--replace", is_flag=True, help="Give a user that is there this role and password.")
@_users
@click.pass_obj
def add(request: Request, name: str, role: str, users: Path | None, *, replace: bool) -> None:
    """Add a user, with a password that is asked for, or is the first line of standard input.

    Sessions of a user that is replaced are over.
    """
    file = users or settings.users_file()
    model.require_name(name)
    if name in storage.read(file) and not replace:
        raise errors.Conflict(
            f"there is a user '{name}' already", hint="--replace gives the user this role and password"
        )
    if request.dry_run:
        _show(request, f"add the user {name} with the role {role}")
        return
    storage.add(file, name, Role(role), _password(name), replace=replace)
    request.done(f"{name} may use the server, role {role}", {"user": {"name": name, "role": role}, "file": str(file)})


@command.command("list", codes=READS, examples=["hvmgr user list"])
@_users
@click.pass_obj
def list_users(request: Request, users: Path | None) -> None:
    """List the users and their roles."""
    file = users or settings.users_file()
    known = storage.read(file).values()
    if request.json:
        shown = [{"name": one.name, "role": one.role.value} for one in known]
        json_out.show({"users": shown, "file": str(file)})
    else:
        render.table(("Name", "Role"), [(one.name, one.role.value) for one in known])


@command.command("remove", examples=["hvmgr user remove backup"])
@click.argument("name", metavar="NAME")
@_users
@click.pass_obj
def remove(request: Request, name: str, users: Path | None) -> None:
    """Remove a user; the sessions of that user are over."""
    file = users or settings.users_file()
    role = storage.require(file, name).role.value
    if request.dry_run:
        _show(request, f"remove the user {name}")
        return
    storage.remove(file, name)
    request.done(f"{name} may not use the server any more", {"user": {"name": name, "role": role}, "file": str(file)})


def _password(name: str) -> str:
    if not sys.stdin.isatty():
        line = arguments.from_stdin(line=True)
        if not line:
            raise errors.UsageError("there is no password on standard input", hint="write it there, as one line")
        return line.rstrip("\n")
    first = getpass.getpass(f"Password of {name}: ")
    if getpass.getpass("Once more: ") != first:
        raise errors.UsageError("the two passwords differ", hint="run the command again")
    return first


def _show(request: Request, subject: str) -> None:
    request.show_plan(Plan(plan_id="", vm_id="", operation="user", subject=subject))
