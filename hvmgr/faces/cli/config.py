"""``hvmgr config``: the settings, and where each one comes from."""

from __future__ import annotations

import os

import click

from hvmgr import settings
from hvmgr.faces.cli import json_out, render
from hvmgr.faces.cli.groups import Group
from hvmgr.faces.cli.request import Request


@click.group("config", cls=Group)
def command() -> None:
    """Show the settings and where they come from."""


@command.command("show", codes=(0, 1, 2), examples=["hvmgr config show", "hvmgr --root /srv/vms config show --json"])
@click.pass_obj
def show(request: Request) -> None:
    """Show each setting, its value, and where it comes from: an option, a variable of the environment, or hvmgr itself."""
    rows = [
        ("uri", request.uri or settings.default_uri(), _source("LIBVIRT_DEFAULT_URI", "-c", given=request.uri)),
        ("root", str(request.root or settings.default_root()), _source("HVMGR_ROOT", "--root", given=request.root)),
        ("index", str(settings.index_folder()), _source("HVMGR_INDEX")),
        ("cache", str(settings.cache_folder()), _source("XDG_CACHE_HOME")),
        ("templates", str(settings.templates_folder()), "default"),
        ("wait", f"{request.wait_s:g}", "--wait" if request.wait_s != settings.LOCK_WAIT_S else "default"),
    ]
    if request.json:
        json_out.show({"config": {name: {"value": value, "source": source} for name, value, source in rows}})
    else:
        render.table(("Setting", "Value", "From"), rows)


def _source(variable: str, option: str = "", *, given: object = None) -> str:
    if given is not None:
        return option
    return variable if os.environ.get(variable) else "default"
